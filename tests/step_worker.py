"""Runs a few training steps of a tiny model in its own process, on a GPU or a CPU.

The arguments are ``bf16`` or ``fp32``, the micro-batch size, and fields of the model as JSON.
Prints losses and gradient norms. Weights and tokens are drawn by the CPU's generator on every
device.
"""

import functools
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_chatflow.runtime.launch import finalize, initialize

NUM_STEPS = 4
# Fields of the model section of other architectures than LLaMA's, as JSON.
ARCHITECTURES = ('{"window_size": [31, 0]}', '{"add_qkv_bias": true}', '{"qk_layernorm": true}')


@functools.cache
def take_steps(
    dtype: str, *, on_gpu: bool, micro_batch_size: int = 2, model: str = "{}"
) -> dict[str, Any]:
    """Runs this file and returns ``losses`` and ``norms`` of each step."""
    environment = dict(os.environ)
    if not on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, __file__, dtype, str(micro_batch_size), model]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    assert result["device"] == ("cuda" if on_gpu else "cpu")
    return result


def set_weights(optimization: Any) -> None:
    """Sets matrices and biases from seeds of their names, and updates the optimizer's copies."""
    for name, parameter in optimization.chunks[0].named_parameters():
        if parameter.dim() > 1 or name.endswith("linear_qkv.bias"):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(drawn)
    optimization.optimizer.reload_model_params()


def main(dtype: str, micro_batch_size: int, fields: dict[str, Any]) -> None:
    ranks = initialize()
    sys.path.append(str(Path(__file__).parents[1] / "tools"))
    from benchmarks import training_steps as subjects
    from benchmarks.shapes import Shape
    from megatron_chatflow.training.loop import train_step

    shape = Shape(2, 128, 352, 4, 2, 96, micro_batch_size, vocab_size=1000)
    config_of = subjects.run_config

    def config_in_dtype(*args: Any, **kwargs: Any) -> Any:
        config = config_of(*args, **kwargs)
        model = replace(config.model, **fields)
        return replace(config, model=model, train=replace(config.train, bf16=dtype == "bf16"))

    norms = []

    def step(*args: Any) -> Any:
        result = train_step(*args)
        norms.append(result.grad_norm)
        return result

    with patch.object(subjects, "run_config", config_in_dtype):
        ours = subjects.Ours(shape, shape.tokens(torch.Generator().manual_seed(0)), ranks)
    set_weights(ours.optimization)
    with patch.object(subjects, "train_step", step):
        losses = [ours.step() for _ in range(NUM_STEPS)]
    print(json.dumps({"device": ranks.device.type, "losses": losses, "norms": norms}))
    finalize()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
