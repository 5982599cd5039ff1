"""Tests that a file that is cut short during a run is an error and no crash."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("boundaries", ["ignore", "isolate"])
def test_a_file_cut_short_is_an_error_and_no_crash(tmp_path: Path, boundaries: str) -> None:
    # In its own process: a failure would end the whole test run.
    script = """
import os, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from data_files import PlainTokenizer, data_config, numbered_documents, write_dataset
from megatron_chatflow.data.source import SourceUnavailableError, build_sources
prefix = write_dataset(Path(sys.argv[1]) / "long", numbered_documents([60000] * 4))
block = {"paths": [prefix], "boundaries": "BOUNDARIES"}
source = build_sources(
    data_config({"long": block}, seq_length=4096), seed=1, tokenizer=PlainTokenizer()
)[0]
before = [source.sample_in_order(k).tokens.copy() for k in range(source.num_samples)]
content = Path(prefix + ".bin").read_bytes()
os.truncate(prefix + ".bin", 4096 * 20)
lost = 0
for k in range(source.num_samples):
    try:
        assert (source.sample_in_order(k).tokens == before[k]).all()
    except SourceUnavailableError as error:
        assert "sources.long" in str(error) and "became shorter" in str(error), error
        lost += 1
assert 0 < lost < source.num_samples, lost
with open(prefix + ".bin", "r+b") as file:
    file.write(content)
for k in range(source.num_samples):
    assert (source.sample_in_order(k).tokens == before[k]).all()
print("lost and found", lost)
""".replace("BOUNDARIES", boundaries)
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-2000:])
    assert "lost and found" in result.stdout
