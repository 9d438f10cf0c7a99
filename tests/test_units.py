"""Sizes are parsed exactly, refused by name, and printed so that they can be read back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from horizonplan.units import format_bytes, format_count, format_seconds, parse_bytes

FACTORS = {
    "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


@given(count=st.integers(1, 10**6), unit=st.sampled_from(sorted(FACTORS)), gap=st.sampled_from(["", " ", "  "]))
def test_a_size_is_its_count_times_its_unit_in_any_case(count, unit, gap):
    for spelled in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f" {count}{gap}{spelled} ") == count * FACTORS[unit]


@given(n=st.integers(1, 2**80))
def test_whole_numbers_are_bytes_however_large(n):
    assert parse_bytes(n) == n
    assert parse_bytes(str(n)) == n


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1.5GiB", 3 * 2**29),
        (".5 KB", 500),
        ("2.TB", 2 * 10**12),
        ("0.1GB", 10**8),
        ("1.0009KB", 1000),  # rounded down: a limit is never widened
        (24e9, 24 * 10**9),
        (np.int64(7), 7),
        (np.float32(8), 8),
    ],
)
def test_fractions_and_other_number_types(size, expected):
    parsed = parse_bytes(size)
    assert parsed == expected
    assert type(parsed) is int


@pytest.mark.parametrize(
    "size",
    [True, np.True_, -1, "-1GiB", 0, "0", "0.4B", math.nan, math.inf, -math.inf, "nan", "inf GiB", "", "GiB", "24G",
     "1e3", "1_000", "1,5GiB", "1 GiB 2", "1.2.3", None, [1], "٣GiB"],
)  # fmt: skip
def test_what_is_no_size_is_refused_by_name_value_and_remedy(size):
    with pytest.raises(ValueError, match="whole bytes >= 1 or a string such as") as error:
        parse_bytes(size, name="node_memory")
    assert str(error.value).startswith(f"node_memory={size!r} ")


def test_zero_is_allowed_where_it_has_a_meaning():
    assert parse_bytes(0, minimum=0) == parse_bytes("0GiB", minimum=0) == 0


@given(n=st.integers(1, 2**50))
def test_printed_bytes_read_back_to_within_half_a_printed_digit(n):
    text = format_bytes(n)
    number, unit = text.split()
    assert abs(parse_bytes(text) - n) <= 0.05 * FACTORS[unit] + 1
    assert float(number) < 1024 or unit == "TiB"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_bytes(24 * 2**30), "24.0 GiB"),
        (format_bytes(2**20 - 1), "1.0 MiB"),  # not 1024.0 KiB
        (format_bytes(0), "0 B"),
        (format_bytes(-(2**31)), "-2.0 GiB"),
        (format_count(1.2e9), "1.2 GFLOP"),
        (format_count(999_999), "1.0 MFLOP"),
        (format_count(5e21), "5000.0 EFLOP"),
        (format_seconds(0.0), "0 µs"),
        (format_seconds(0.5), "500.0 ms"),
        (format_seconds(59.94), "59.9 s"),
        (format_seconds(59.96), "1 min 0 s"),
        (format_seconds(3599.6), "1 h 0 min"),
    ],
)
def test_numbers_are_printed_in_the_unit_a_reader_would_choose(text, expected):
    assert text == expected
