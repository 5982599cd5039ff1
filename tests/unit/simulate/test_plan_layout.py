"""Tests the command line of tools/plan_layout.py."""

import sys
from pathlib import Path

import pytest

from megatron_chatflow.cli.plan_layout import main
from megatron_chatflow.config import load_config, validate_for_world
from megatron_chatflow.config.memory import estimate_memory
from megatron_chatflow.errors import run_main
from megatron_chatflow.simulate.layout_search import plan_layout, search_layouts
from megatron_chatflow.simulate.step_time import GPUS

CONFIG = Path(__file__).parents[3] / "examples" / "llama2_7b" / "7b.yaml"
ARGUMENTS = ["--config", str(CONFIG), "--vocab-size", "40076"]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Returns a function that runs the tool and returns its status, output and errors."""

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan_layout.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_main(main)
        return left.value.code, *capsys.readouterr()

    return run


def test_the_table_ranks_layouts_with_time_and_cost(call) -> None:
    status, text, errors = call(
        *ARGUMENTS, "--gpus", "8,16", "--tokens", "8B", "--price", "2.5", "--top", "3"
    )
    assert (status, errors) == (0, "")
    first, second = text.split("\n16 x h100, ")
    assert first.startswith(
        "8 x h100, 256 samples of 4,096 tokens per step, 8,000,000,000 tokens: "
    )
    header, _, best, *_ = first.splitlines()[3:]
    names = ["rank", "layout", "GiB", "s/step", "tokens/s/GPU", "from", "to", "MFU %", "days"]
    assert [name.strip() for name in header.split("  ") if name][: len(names)] == names
    found = search_layouts(load_config(CONFIG), 8, GPUS["h100"], 40076)
    assert best.startswith("1     " + found[0].name)
    speed = found[0].tokens_per_second / 8
    hours = 8e9 / found[0].tokens_per_second / 3600
    loss, share = found[0].step.largest_loss
    cells = (f"{speed:,.0f}", f"{0.7 * speed:,.0f}", f"{1.05 * speed:,.0f}", f"{hours / 24:.2f}")
    for cell in (*cells, f"{hours * 8:,.0f}", f"{hours * 8 * 2.5:,.0f}"):
        assert f" {cell} " in best
    assert best.endswith(f"{loss} {100 * share:.0f} %")
    assert "\nfile " in first and "the layout in the file is predicted " in first
    assert "layouts tie with the fastest, within 8 %; the simplest one, and" in second


def test_the_best_layout_is_written_as_yaml(call, tmp_path: Path) -> None:
    output = tmp_path / "plans" / "best.yaml"
    status, text, errors = call(
        *ARGUMENTS, "--gpus", "8,16", "--gpu", "H200", "--network-gbps", "100", "--output", output
    )
    assert (status, errors) == (0, "")
    for num_gpus in (8, 16):
        path = output.with_name(f"best_{num_gpus}gpus.yaml")
        config = load_config(path)
        (best, *_) = search_layouts(
            load_config(CONFIG, ["--vocab-size", "40076"]),
            num_gpus,
            GPUS["h200"],
            40076,
            network=12.5e9,
        )
        assert config == best.config
        assert path.read_text().startswith(f"# {best.name} on {num_gpus} x H200: predicted, not ")
        assert f"wrote {best.name} to {path}" in text
    assert call(*ARGUMENTS, "--gpus", "8", "--output", output)[0] == 0
    validate_for_world(load_config(output), 8)
    assert estimate_memory(load_config(output), 40076, 8).total < 72 * 2**30


def test_a_measured_run_scales_the_table(call, tmp_path: Path) -> None:
    config = load_config(CONFIG, ["--vocab-size", "40076"])
    planned = plan_layout(config, 8, GPUS["h100"], 40076)
    slow, tokens = planned.seconds / 0.9, 256 * 4096
    line = (
        f'{{"seconds": {slow}, "tokens_per_second": {tokens / slow}, '
        f'"tokens_per_second_per_gpu": {tokens / slow / 8}}}\n'
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "metrics.jsonl").write_text(line * 20)
    metrics = tmp_path / "metrics.jsonl"
    status, text, _ = call(*ARGUMENTS, "--gpus", "16", "--calibrate", metrics)
    assert status == 0
    assert f"{planned.name} on 8 GPUs reaches 0.90 of the predicted speed" in text
    assert "expect 0.85 to 1.15 of them" in text
    speed = plan_layout(config, 16, GPUS["h100"], 40076, speed=0.9).tokens_per_second / 16
    own = next(row for row in text.splitlines() if row.startswith("file "))
    assert f" {speed:,.0f} " in own


def test_without_the_tokenizer_the_vocabulary_is_assumed(call) -> None:
    status, _, errors = call("--config", CONFIG, "--gpus", "8")
    assert status == 0
    assert errors.startswith("note: assuming a vocabulary of 32,000: ")


OFFLOAD = ["--use-precision-aware-optimizer", "--optimizer-cpu-offload"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8;16"], "--gpus: must be numbers of GPUs such as 64 or 64,256, not '8;16'"),
        (["--gpus", "0"], "--gpus: must be numbers of GPUs such as 64 or 64,256, not '0'"),
        (["--gpus", "1"], "--gpus: no valid layout fits on 1 x h100; use more GPUs, or a global "),
        (
            ["--gpus", "8", "--gpu", "h10"],
            "GPU 'h10': is not known (did you mean h100?); use one of",
        ),
        (["--gpus", "8", "--price", "0"], "--price: must be above 0, not 0.0"),
        (["--gpus", "8", "--network-gbps", "-1"], "--network-gbps: must be above 0, not -1.0"),
        (["--gpus", "8", "--tokens", "many"], "--tokens: must be a count such as 500, 8K"),
        (
            [*OFFLOAD, "--gpus", "8"],
            "optimizer.optimizer_cpu_offload: speeds are predicted without offloading",
        ),
        (["--gpus", "8", "--no-bf16"], "train.bf16: speeds are predicted for bf16 only"),
        (["--gpus", "8", "--no-such-flag"], "--no-such-flag: unknown flag"),
        (["--gpus", "8", "--calibrate", "absent/metrics.jsonl"], "absent/config.yaml: no such "),
    ],
)
def test_mistakes_are_one_line(call, arguments: list[str], message: str) -> None:
    status, _, errors = call(*ARGUMENTS, *arguments)
    assert status == 2
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1


def test_the_file_is_checked_before_the_search(call, tmp_path: Path) -> None:
    status, text, errors = call(*ARGUMENTS, "--gpus", "8", "--output", tmp_path)
    assert (status, text) == (2, "") and errors.count("\n") == 1
