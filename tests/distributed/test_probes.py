"""Tests probes of transfer during training.

The numbers are the same in every layout, after a resume and of an export, and the probes do not
affect the run.
"""

import json
from pathlib import Path

import jobs
import pytest
from tiny_run import TinyRun, made_up_sentences

from megatron_chatflow.convert.to_huggingface import export_checkpoint
from megatron_chatflow.evaluation.models import LanguageModel
from megatron_chatflow.evaluation.probes import evaluate_probe, parse_probes

LAYOUTS: dict[str, list[str]] = {
    "tp2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
    "dp2": [],
    "cp2": ["--context-parallel-size", "2"],
}


def probes_in(root: Path) -> list[str]:
    return [
        "copy,length=20,strings=5,repeats=3",
        f"fewshot,shots=2,questions=6,max_bytes=60:{root / 'questions.jsonl'}",
        f"translation,pairs=7:{root / 'sentences.tsv'}",
        f"pairs:{root / 'minimal.jsonl'}",
    ]


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun) -> Path:
    """Trains a run without probes, the same run with them and resumed, and one per layout."""
    root = tiny_run.folder / "probes"
    root.mkdir()
    words = " ".join(made_up_sentences(40, seed=9)).replace(".", "").split()
    files: dict[str, list[object]] = {
        "questions.jsonl": [
            {"prompt": a, "completion": f"{a} {b}"} for a, b in zip(words, words[7:], strict=False)
        ][:20],
        "minimal.jsonl": [
            {"good": f"{a} {b} {c}", "bad": f"{b} {a} {c}", "kind": "order"}
            for a, b, c in zip(words[:9], words[1:], words[2:], strict=False)
            if a != b
        ],
    }
    for name, records in files.items():
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    sides = made_up_sentences(12, seed=8)
    lines = [f"{a[:60]}\t{b[:60]}\n" for a, b in zip(sides, sides[1:], strict=False)]
    (root / "sentences.tsv").write_text("".join(lines))
    base: list[object] = ["--config", tiny_run.config, "--train-iters", 4]
    asked = [*base, "--eval-probes", *probes_in(root), "--probe-interval", 2]
    half = [*asked, "--save", root / "resumed"]
    alone = [
        [*base, "--save", root / "plain"],
        [*asked, "--save", root / "asked"],
        [*half, "--exit-interval", 2],
        [*half, "--load", root / "resumed"],
    ]
    jobs.run_layouts(1, alone, root)  # type: ignore[arg-type]
    layouts = [[*asked, *flags, "--save", root / name] for name, flags in LAYOUTS.items()]
    jobs.run_layouts(2, layouts, root)  # type: ignore[arg-type]
    return root


def probes_of(folder: Path) -> dict[int, dict[str, dict[str, float]]]:
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found = [entry for entry in entries if "probes" in entry]
    assert all(entry["probe_seconds"] > 0 for entry in found)
    assert [entry["iteration"] for entry in found] == [0, 2, 4]
    return {entry["iteration"]: entry["probes"] for entry in found}


@pytest.mark.distributed
def test_probes_leave_the_run_as_it_was(folder: Path) -> None:
    expected, expected_validation = jobs.read_metrics(folder / "plain")
    for name in ("asked", "resumed"):
        found, found_validation = jobs.read_metrics(folder / name)
        assert len(found) == 4 and found_validation == expected_validation
        for ours, theirs in zip(found, expected, strict=True):
            for key in ("batch_digest", "lm_loss", "grad_norm"):
                assert ours[key] == theirs[key]


@pytest.mark.distributed
def test_a_resumed_run_has_the_same_numbers(folder: Path) -> None:
    assert probes_of(folder / "resumed") == probes_of(folder / "asked")


@pytest.mark.distributed
def test_numbers_are_those_of_an_export(folder: Path) -> None:
    logged = probes_of(folder / "asked")[4]
    export_checkpoint(folder / "asked", folder / "asked_hf")
    model = LanguageModel(folder / "asked_hf", max_length=64)
    probes = parse_probes(probes_in(folder), "--probe")
    assert list(logged) == [probe.label for probe in probes]
    for probe in probes:
        assert logged[probe.label] == pytest.approx(
            evaluate_probe(model, probe), rel=1e-4, abs=1e-4
        )
    assert logged["translation sentences"]["num_pairs"] == 7
    assert logged["copy"]["gain_bits_per_token_stderr"] > 0


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_numbers(folder: Path, layout: str) -> None:
    expected = probes_of(folder / "asked")
    for iteration, results in probes_of(folder / layout).items():
        for label, result in results.items():
            assert result == pytest.approx(expected[iteration][label], rel=1e-4, abs=1e-4)
