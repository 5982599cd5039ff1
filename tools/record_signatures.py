#!/usr/bin/env python3
"""Records the signatures of foreign functions that this package calls, from unpacked sources.

The libraries need a GPU to be installed, so the test suite compares our calls with this record.
Sources come from `pip download --no-deps` or a repository, in folders whose names end in versions.

Examples:
  tools/record_signatures.py flash_attn-2.8.3 transformer_engine-2.9 --output R.json
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import ast
import json
import re
from pathlib import Path
from typing import Any

from megatron_chatflow.errors import ArgumentParser, UserError, run_main
from megatron_chatflow.files import check_output_file, write_output_file

# The called functions: path inside the sources, and names. `forward` implements a class's
# `__call__`, and the name of a class stands for its constructor. A function that moved between
# releases is looked for in each file. Functions in C++ extensions (transformer_engine_torch's
# `multi_tensor_*`, Apex's) have no sources in Python and are not recorded.
_TE = "transformer_engine/pytorch"
_ATTENTION = ["DotProductAttention.__init__", "DotProductAttention.forward"]
_FP8 = ["FP8GlobalStateManager.is_fp8_enabled", "FP8GlobalStateManager.reset"]
_FP8 += ["fp8_autocast", "fp8_model_init"]
_QUANTIZED = ["QuantizedTensor.dequantize", "QuantizedTensor.quantize_"]
WANTED = {
    "flash_attn/flash_attn_interface.py": ["flash_attn_varlen_func"],
    "hopper/flash_attn_interface.py": ["flash_attn_varlen_func"],
    "flash_attn/cute/interface.py": ["flash_attn_varlen_func"],
    f"{_TE}/attention.py": _ATTENTION,
    f"{_TE}/attention/dot_product_attention/dot_product_attention.py": _ATTENTION,
    f"{_TE}/attention/rope.py": ["apply_rotary_pos_emb"],
    f"{_TE}/module/rmsnorm.py": ["RMSNorm.__init__"],
    f"{_TE}/module/linear.py": ["Linear.__init__", "Linear.forward"],
    f"{_TE}/module/layernorm_linear.py": ["LayerNormLinear.__init__", "LayerNormLinear.forward"],
    f"{_TE}/module/base.py": [
        "TransformerEngineBaseModule.get_extra_state",
        "TransformerEngineBaseModule.set_extra_state",
        "get_dummy_wgrad",
        "initialize_ub",
        "destroy_ub",
    ],
    f"{_TE}/ops/op.py": ["BasicOperation.forward"],  # RMSNorm's
    f"{_TE}/graph.py": [
        "make_graphed_callables",
        "set_capture_start",
        "set_capture_end",
        "save_fp8_tensors",
        "restore_fp8_tensors",
    ],
    f"{_TE}/distributed.py": [
        "activation_recompute_forward",
        "checkpoint",
        "get_all_rng_states",
        "is_fp8_activation_recompute_enabled",
    ],
    # megatron-core prefers the module of version 1, where there is one.
    f"{_TE}/cpu_offload_v1.py": ["get_cpu_offload_context"],
    f"{_TE}/cpu_offload.py": ["get_cpu_offload_context"],
    f"{_TE}/fp8.py": _FP8,
    f"{_TE}/quantization.py": _FP8,
    f"{_TE}/tensor/quantized_tensor.py": _QUANTIZED,
    f"{_TE}/quantized_tensor.py": _QUANTIZED,
    f"{_TE}/tensor/float8_tensor.py": ["Float8Tensor.dequantize", "Float8Tensor.quantize_"],
    f"{_TE}/tensor/mxfp8_tensor.py": ["MXFP8Tensor.dequantize", "MXFP8Tensor.quantize_"],
    f"{_TE}/tensor/utils.py": [
        "replace_raw_data",
        "cast_master_weights_to_fp8",
        "post_all_gather_processing",
    ],
    f"{_TE}/utils.py": ["make_weak_ref"],
    f"{_TE}/optimizers/multi_tensor_apply.py": ["MultiTensorApply.__call__"],
    "transformer_engine/common/recipe/__init__.py": [
        "DelayedScaling",
        "Float8CurrentScaling",
        "Float8BlockScaling",
        "MXFP8BlockScaling",
        "NVFP4BlockScaling",
    ],
    "apex/optimizers/fused_adam.py": ["FusedAdam.__init__"],
    f"{_TE}/optimizers/fused_adam.py": [
        "FusedAdam.__init__",
        "FusedAdam.initialize_state",
        "FusedAdam.get_unscaled_state",
        "FusedAdam.set_scaled_state",
        "FusedAdam.step",
    ],
}


def parameters_of(called: ast.FunctionDef | ast.ClassDef) -> list[str]:
    """Returns names without the bound one, and ``=`` after those that have a default.

    ``*`` precedes what can only be given by keyword, ``*args`` and ``**kwargs`` keep their stars.
    For a dataclass these are its annotated fields in their order.
    """
    if isinstance(called, ast.ClassDef):
        fields = [(s.target, s.value) for s in called.body if isinstance(s, ast.AnnAssign)]
        return [ast.unparse(name) + ("" if value is None else "=") for name, value in fields]
    spec = called.args
    positional = [*spec.posonlyargs, *spec.args]
    num_required = len(positional) - len(spec.defaults)
    names = [a.arg + ("" if i < num_required else "=") for i, a in enumerate(positional)]
    names = names[1:] if names[:1] in (["self"], ["cls"], ["ctx"]) else names
    if spec.vararg is not None:
        names.append(f"*{spec.vararg.arg}")
    elif spec.kwonlyargs:
        names.append("*")
    for a, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        names.append(a.arg + ("" if default is None else "="))
    return names if spec.kwarg is None else [*names, f"**{spec.kwarg.arg}"]


def find(tree: ast.AST, dotted: str) -> ast.FunctionDef | ast.ClassDef | None:
    """Returns the function ``name`` or the method ``Class.name``, or None if it does not exist.

    The name of a class stands for its ``__init__``, or for the class itself if it has none.
    """
    *classes, name = dotted.split(".")
    nodes = list(ast.iter_child_nodes(tree))
    for wanted in classes:
        found = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name == wanted]
        nodes = list(ast.iter_child_nodes(found[0])) if found else []
    named = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
    if named and isinstance(named[-1], ast.ClassDef):
        return find(named[-1], "__init__") or named[-1]
    return named[-1] if named else None


def record(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of all wanted functions in one unpacked library.

    Raises:
        UserError: The folder's name has no version, or no wanted function was found.
    """
    rows = []
    version = re.search(r"-v?(\d[\w.]*)", folder.name)
    if version is None:
        raise UserError(f"{folder}: the folder name must end in a version, as in name-1.2")
    for file, names in WANTED.items():
        for path in sorted(folder.glob(file)) + sorted(folder.glob(f"*/{file}")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for name in names:
                if (function := find(tree, name)) is not None:
                    row = {"file": file, "function": name, "version": version[1]}
                    rows.append({**row, "parameters": parameters_of(function)})
    if not rows:
        raise UserError(f"{folder}: contains none of {', '.join(WANTED)}")
    return rows


def main() -> int:
    """Runs the command line."""
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="unpacked sources")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="R.json", help="file to write"
    )
    arguments = parser.parse_args()
    check_output_file(arguments.output)
    rows = [row for folder in arguments.folders for row in record(folder)]
    write_output_file(arguments.output, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(f"{len(rows)} signatures")
    return 0


if __name__ == "__main__":
    run_main(main)
