"""Calls the tools' `main` functions in the process of the tests."""

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

from megatron_chatflow.errors import run_main

TOOLS = Path(__file__).parents[1] / "tools"


def call_tool(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Does what ``python tools/name arguments`` does, and returns its status and output.

    Messages of `logging` go where the test's process sends them, for example to `caplog`.
    """
    command = [str(TOOLS / name), *map(str, arguments)]
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    status = None
    with mock.patch.object(sys, "argv", command), redirect_stdout(output), redirect_stderr(errors):
        try:
            run_main(runpy.run_path(command[0], run_name="tool")["main"])
        except SystemExit as left:
            status = left.code
    assert isinstance(status, int), f"{command} exits with {status!r}"
    texts = []
    for stream in (output, errors):
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(command, status, *texts)
