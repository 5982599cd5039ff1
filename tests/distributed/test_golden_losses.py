"""Tests golden losses. A change that moves them must be explained in the changelog.

Token ids come from Python's random generator, so only the model, the optimizer and the data path
determine the losses. Other CPUs and library versions split fp32 sums differently; the tolerance of
1e-4 is a hundred times the observed effect and far below that of a changed formula.
"""

import random
from pathlib import Path

import jobs
import numpy as np
import pytest
from tiny_run import TinyRun

from megatron_chatflow.data.indexed import IndexedDatasetWriter

GOLDEN_LOSSES = [
    6.683442,
    6.699229,
    6.218798,
    5.893410,
    5.858250,
    5.653968,
    5.398513,
    5.252157,
    5.284283,
    5.076646,
]
GOLDEN_GRAD_NORM = 2.508614
GOLDEN_DIGEST = "fe6088bae29984c35533ea9598a41bdb"


def _write_chain(prefix: Path, seed: int) -> None:
    """Writes documents in which each id mostly follows from the previous one."""
    rng = random.Random(seed)
    writer = IndexedDatasetWriter(prefix, np.uint16)
    for _ in range(200):
        ids = [rng.randrange(3, 600)]
        for _ in range(rng.randrange(5, 150)):
            jump = rng.random() < 0.3
            ids.append(rng.randrange(3, 600) if jump else 3 + (ids[-1] * 7 + 1) % 97)
        writer.add_document(np.array([*ids, 2], np.uint16))
    writer.finalize()


@pytest.mark.distributed
def test_losses_of_ten_iterations(tiny_run: TinyRun, tmp_path: Path) -> None:
    text = tiny_run.config.read_text(encoding="utf-8")
    for number, name in enumerate(("first", "second")):
        _write_chain(tmp_path / f"{name}_text_document", seed=number)
    config = tmp_path / "run.yaml"
    config.write_text(
        text.replace(f"{tiny_run.folder}/first", f"{tmp_path}/first").replace(
            f"{tiny_run.folder}/second", f"{tmp_path}/second"
        )
    )
    jobs.run(jobs.pretrain("--config", config, "--save", tmp_path / "run"))
    iterations, _ = jobs.read_metrics(tmp_path / "run")
    assert iterations[-1]["batch_digest"] == GOLDEN_DIGEST
    assert [entry["lm_loss"] for entry in iterations] == pytest.approx(GOLDEN_LOSSES, abs=1e-4)
    assert iterations[-1]["grad_norm"] == pytest.approx(GOLDEN_GRAD_NORM, rel=1e-3)
