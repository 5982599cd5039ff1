"""Tests sliding windows and YaRN at several parallel layouts.

Every layout reproduces the losses of a single process, and differs from the same run without a
window. Some text is packed, some documents are isolated; samples are three times as long as the
window. For the tolerance see `test_layouts`.
"""

from pathlib import Path

import jobs
import pytest
from test_layouts import CONTEXT, SEQUENCE, TOLERANCE, VIRTUAL
from tiny_run import TinyRun

WINDOW = ["--window-size", "20,0", "--train-iters", "3", "--no-untie-embeddings-and-output-weights"]
YARN = ["--rope-scaling-type", "yarn", "--rope-scaling-factor", "4"]
YARN += ["--rope-original-max-position-embeddings", "32"]
LAYOUTS = {
    "tp_sequence": SEQUENCE,
    "pp_virtual": VIRTUAL,
    "cp": CONTEXT,
    "dp_micro_batch_1": ["--micro-batch-size", "1", "--use-distributed-optimizer"],
}


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun) -> Path:
    """Returns a folder with one run per layout."""
    folder = tiny_run.folder / "windows"
    folder.mkdir()
    base = ["--config", tiny_run.config, *YARN, *WINDOW]
    single = [
        [*base, "--save", folder / "single"],
        [*base, "--window-size", "none", "--save", folder / "without"],
    ]
    jobs.run_layouts(1, single, folder)
    layouts = [[*base, *flags, "--save", folder / name] for name, flags in LAYOUTS.items()]
    jobs.run_layouts(2, layouts, folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_equal_a_single_process(runs: Path, layout: str) -> None:
    expected, expected_validation = jobs.read_metrics(runs / "single")
    found, found_validation = jobs.read_metrics(runs / layout)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=TOLERANCE)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for ours, theirs in zip(found_validation, expected_validation, strict=True):
        for source, values in theirs["validation"].items():
            loss = ours["validation"][source]["loss"]
            assert loss == pytest.approx(values["loss"], abs=TOLERANCE)


@pytest.mark.distributed
def test_the_window_changes_the_loss(runs: Path) -> None:
    with_window, without = (jobs.read_metrics(runs / name)[0] for name in ("single", "without"))
    difference = abs(with_window[0]["grad_norm"] - without[0]["grad_norm"])
    assert difference > 100 * TOLERANCE
