"""Tests the error message of a rank that ends."""

import io
import sys

import pytest

from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.exit_reporter import ExitReporter
from megatron_chatflow.runtime.ranks import ProcessRank


def test_a_message_that_is_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """File names and damaged JSON may contain lone surrogates."""
    output = io.BytesIO()
    # like Python's own
    stream = io.TextIOWrapper(output, encoding="utf-8", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", stream)
    assert ExitReporter(ProcessRank.from_environment()).report(
        UserError("a\udcff.json: is damaged")
    )
    assert output.getvalue() == b"error: a\\udcff.json: is damaged\n"
