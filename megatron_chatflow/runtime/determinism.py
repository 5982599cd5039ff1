"""Runs whose every bit is the same each time, as far as kernels go.

In: the environment before CUDA starts. Out: torch, cuBLAS, NCCL and transformer-engine set so that
they choose deterministic kernels; flash-attn is told call by call. What is set is tested; that the
bits are the same has not been seen on a GPU yet.
"""

import os
from collections.abc import MutableMapping

import torch

from megatron_chatflow.errors import UserError

# cuBLAS is deterministic with workspaces of fixed size; NCCL with one algorithm for all sizes.
_REQUIRED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def use_deterministic_algorithms(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets everything; has to come before the process's first use of CUDA.

    Raises:
        UserError: CUDA has started, or a variable is set to something else.
    """
    has_started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if has_started:
        raise UserError(
            "train.deterministic_mode: CUDA has started already, and cuBLAS with it; ask for it "
            "before anything else"
        )
    for name, values in _REQUIRED.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"environment variable {name}: {given!r} is not deterministic; use "
                f"{' or '.join(values)}, or leave it out"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
