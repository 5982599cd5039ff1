"""Fixtures of made-up packages."""

from made_up_archives import packages, pin_of, publish, write_archive  # noqa: F401
