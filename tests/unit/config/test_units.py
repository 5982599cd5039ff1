"""Tests that counts with units and numbers are parsed exactly, and everything else is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_chatflow.config.fields import (
    UNITS,
    parse_count,
    parse_num_bytes,
    parse_number,
    parse_shares,
    shorten,
)
from megatron_chatflow.errors import UserError


@pytest.mark.parametrize(
    ("written", "count"),
    [
        (500, 500),
        (0, 0),
        (1e6, 1_000_000),
        ("8K", 8_000),
        ("5M", 5_000_000),
        ("1.5B", 1_500_000_000),
        ("1T", 10**12),
        ("5 M", 5_000_000),
        ("5m", 5_000_000),
        ("0.123456789012T", 123_456_789_012),
        ("1e6", 1_000_000),
        ("2.5e3K", 2_500_000),
        ("1_000_000", 1_000_000),
        ("-3K", -3_000),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_counts_are_exact(written: object, count: int) -> None:
    parsed = parse_count(written)
    assert parsed == count
    assert type(parsed) is int


@pytest.mark.parametrize(
    "written",
    ["3", "-3", "", "K", "5G", "5MB", "1.5", "1.2345K", "1e-3", "1__0K", "_1K", "1_K", "0x10K"]
    + [True, False, None, 1.5, float("nan"), float("inf"), [5], {}, b"5M", 2**63, "10000000T"],
)
def test_anything_else_is_no_count(written: object) -> None:
    with pytest.raises(UserError, match="must be"):
        parse_count(written)


@given(st.integers(min_value=0, max_value=10**6), st.sampled_from(sorted(UNITS)))
def test_units_multiply(count: int, unit: str) -> None:
    assert parse_count(f"{count}{unit}") == count * UNITS[unit]


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_fractions_of_a_unit_are_not_rounded(whole: int, thousandths: int) -> None:
    assert parse_count(f"{whole}.{thousandths:03d}M") == whole * 10**6 + thousandths * 1000


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_taken_as_they_are(number: float) -> None:
    assert parse_number(number) == number
    assert parse_number(f"{number:.17e}") == number


@pytest.mark.parametrize("written", ["3e-4", "3E-4", "0.3e-3", "+3.e-4", ".0003e0"])
def test_exponents_may_be_text(written: str) -> None:
    assert parse_number(written) == pytest.approx(3e-4)


@pytest.mark.parametrize(
    "written", ["3", "0.1", "nan", "1e", "e4", "", True, None, [], b"1e3", 10**400]
)
def test_anything_else_is_no_number(written: object) -> None:
    with pytest.raises(UserError, match="must be a number"):
        parse_number(written)


def test_values_in_messages_are_short() -> None:
    nested: object = "x"
    for _ in range(30):
        nested = [nested] * 10
    assert len(shorten(nested)) < 2000
    assert len(shorten("y" * 10_000)) < 100


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5 gb", 1_500_000_000),
        ("2GiB", 2**31),
        ("60kb", 60_000),
        ("1TB", 10**12),
        ("40000", 40_000),
        ("5B", 5 * 10**9),  # the spelling of earlier versions
        ("1e6", 10**6),
    ],
)
def test_sizes_in_bytes(written: str, num_bytes: int) -> None:
    assert parse_num_bytes(written) == num_bytes


@pytest.mark.parametrize("written", ["", "GB", "5 bytes", "0", "0GB", "-1GB", "1.0001KB", "9e10GB"])
def test_sizes_in_bytes_that_are_none(written: str) -> None:
    with pytest.raises(UserError, match="must be a size such as 5GB, 500MB or 2GiB, not "):
        parse_num_bytes(written)


def test_shares_of_splits() -> None:
    assert parse_shares("969, 30, 1") == (0.969, 0.03, 0.001)
    assert parse_shares("3,1") == (0.75, 0.25, 0.0)
    for wrong in ("", "a", "1,2,3,4", "0,1", "0,0,0", "-1,2", "1;2", "nan", 969, None):
        with pytest.raises(UserError, match="^must "):
            parse_shares(wrong)
