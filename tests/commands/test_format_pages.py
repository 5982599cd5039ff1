"""Runs the commands of the pages on formats, each page in a folder of its own."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_chatflow.data.indexed import IndexedDataset

ROOT = Path(__file__).parents[2]
# Number of documents of each output.
EXPECTED = {
    "parallel_text": {"aligned": 3, "opus": 3, "memory": 1, "csv": 1, "bars": 1, "filtered": 2},
    "containers": {"csv": 2, "nested_doc": 1, "saved": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("page", EXPECTED)
def test_commands_of_a_page(tmp_path: Path, tiny_sentencepiece_model: Path, page: str) -> None:
    pytest.importorskip("pyarrow")
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    script = "set -eo pipefail\n" + "".join(blocks)
    script = script.replace("python ", f"{sys.executable} ").replace("tools/", f"{ROOT}/tools/")
    shutil.copy(tiny_sentencepiece_model, tmp_path / "tokenizer.model")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in (tmp_path / "out").glob("*_document.idx"):
        name = path.name.removesuffix("_document.idx").removesuffix("_text").removesuffix(".text")
        found[name] = IndexedDataset(path.with_suffix("")).num_documents
    assert found == EXPECTED[page]
    assert text.count("tools/preprocess_data.py") - 1 == len(found)  # one command for each output
