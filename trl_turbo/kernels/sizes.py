"""Whole numbers for launchers: Triton's own functions of these names cost the host microseconds outside of kernels."""

from __future__ import annotations


def ceil_div(count: int, part: int) -> int:
    """How many parts cover `count`."""
    return -(-count // part)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below a positive number."""
    return 1 << (number - 1).bit_length()
