"""Stand-ins for the state of FP8, which is always off."""

from contextlib import contextmanager


class FP8GlobalStateManager:
    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def reset(cls) -> None:
        pass


@contextmanager
def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False):
    assert not enabled, "the stand-in has no FP8"
    yield
