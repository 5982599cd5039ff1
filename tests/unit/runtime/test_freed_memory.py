"""Tests that freed memory is returned once enough has accumulated."""

from megatron_chatflow.training.callbacks.process import FreedMemory

MIB = 1 << 20


def _measured(*held: int | None) -> int:
    """Returns how often memory was returned for these amounts measured after steps."""
    given_back = []
    amounts = iter(held)
    watch = FreedMemory(measure=lambda: next(amounts), give_back=lambda: given_back.append(1))
    for _ in held:
        watch.after_iteration(1)
    return len(given_back)


def test_it_gives_back_what_grew_and_begins_anew() -> None:
    assert _measured(1000 * MIB, 1100 * MIB, 1450 * MIB) == 0
    assert _measured(1000 * MIB, 1457 * MIB) == 1
    # The memory that a step needs may have grown for good, for example by a checkpoint's staging
    # buffer.
    assert _measured(1000 * MIB, 3000 * MIB, 2900 * MIB, 3000 * MIB, 3000 * MIB) == 1
    assert _measured(1000 * MIB, 3000 * MIB, 1000 * MIB, 3000 * MIB) == 2
    assert _measured(None, None) == 0
