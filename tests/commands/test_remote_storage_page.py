"""Runs the preprocessing command of docs/remote_storage.md against an S3 server."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from object_store import ObjectStore

ROOT = Path(__file__).parents[2]


def test_the_command_of_the_page(
    object_store: ObjectStore, tiny_sentencepiece_model: Path, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "remote_storage.md").read_text(encoding="utf-8")
    found = re.search(r"```bash\npython (tools/preprocess_data.py .*?)```", page, re.S)
    assert found is not None
    script, *arguments = shlex.split(found[1].replace("\\\n", " "))
    lines = b"".join(json.dumps({"text": f"bana luno {k}"}).encode() + b"\n" for k in range(50))
    object_store.put("raw/en/a.jsonl", lines)
    object_store.put("raw/news/b.jsonl.gz", gzip.compress(lines))
    object_store.put("raw/news/notes.txt", b"no input")
    shutil.copy(tiny_sentencepiece_model, tmp_path / "tokenizer.model")
    environment = {
        **os.environ,
        **object_store.environment,
        "MEGATRON_CHATFLOW_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }

    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / script), *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "text: 100 documents" in done.stdout
    written = [name for name in object_store.names() if name.startswith("tokens/")]
    assert written == [f"tokens/en_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    again = run()
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1] == (
        "error: output exists: s3://corpora/tokens/en_text_document.idx: choose another prefix or "
        "use --overwrite"
    )
    assert "Traceback" not in again.stderr


def test_a_local_job_does_not_load_fsspec(tiny_sentencepiece_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "bana luno"}\n')
    code = (
        "import sys; from megatron_chatflow.cli.preprocess import main; main(); "
        "sys.exit('fsspec' in sys.modules)"
    )
    flags = ["--input", "a.jsonl", "--output-prefix", "out", "--tokenizer-model"]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, str(tiny_sentencepiece_model), "--workers", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out_text_document.idx").exists()
