"""Tests long error messages, and that an ignored Ctrl-C stays ignored."""

import pickle
import signal

from megatron_chatflow.errors import LocalError, UserError, exit_on_interrupt


def test_long_messages_keep_their_cause_and_their_advice() -> None:
    error = UserError("no number: f.json: " + "9" * 70_000 + ": write one")
    assert len(str(error)) <= 1000
    assert str(error).startswith("no number: f.json: 99") and str(error).endswith("99: write one")
    assert "[... 69070 characters ...]" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(LocalError("a" * 999)) == "a" * 999


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        exit_on_interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
