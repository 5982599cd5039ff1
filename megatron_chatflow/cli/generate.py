"""``chatflow generate``: continues or answers prompts with a model."""

import logging
from pathlib import Path

from megatron_chatflow.convert.huggingface_folder import huggingface_folder
from megatron_chatflow.convert.template import TokenizerChoice
from megatron_chatflow.errors import ArgumentParser
from megatron_chatflow.generation.generate import (
    Generator,
    add_sampling_arguments,
    read_prompt,
    sampling_from_args,
)

EXAMPLES = """examples:
  %(prog)s exports/zh --prompt "Once upon a time" --max-new-tokens 100
  %(prog)s runs/zh --chat --prompt "请介绍一下北京。" --seed 1
  echo "a long prompt" | %(prog)s exports/zh --prompt -
"""


def main() -> None:
    """Prints one continuation of each prompt as its tokens are generated."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = ArgumentParser("Completes prompts, or answers them with --chat.", EXAMPLES)
    parser.add_argument("model", type=Path, help="Hugging Face folder, run or iter_ folder")
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="prompt (repeatable); - reads standard input",
    )
    parser.add_argument(
        "--chat", action="store_true", help="format the prompt with the chat template and answer it"
    )
    parser.add_argument("--system", help="system message for --chat")
    add_sampling_arguments(parser)
    args = parser.parse_args()
    sampling = sampling_from_args(args)
    prompts = [read_prompt(text) for text in args.prompt]
    choice = TokenizerChoice(args.tokenizer_model, args.chat_template)
    with huggingface_folder(args.model, choice) as folder:
        generator = Generator(folder, args.chat_template_kwargs)
        for number, prompt in enumerate(prompts):
            if number:
                print()
            print(f"> {prompt}" if args.chat else prompt, end="\n" if args.chat else "")
            system = [{"role": "system", "content": args.system}] if args.system else []
            ids = (
                generator.encode_chat([*system, {"role": "user", "content": prompt}])
                if args.chat
                else generator.encode(prompt)
            )
            generator.stream(ids, sampling, lambda text: print(text, end="", flush=True))
            print()
