"""Sizes of launches. Triton's own functions, which kernels may call too, take ten times as long."""

from __future__ import annotations


def cdiv(number: int, by: int) -> int:
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """Of a positive number; itself if it is one."""
    return 1 << (number - 1).bit_length()
