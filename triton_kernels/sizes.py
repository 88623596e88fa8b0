"""Sizes of launches. Triton's own functions, which kernels may call too, take ten times as long."""

from __future__ import annotations

LANES_PER_WARP = 128


def cdiv(number: int, by: int) -> int:
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """Of a positive number; itself if it is one."""
    return 1 << (number - 1).bit_length()


def lanes_of_canvas(length: int) -> dict[str, int]:
    """Of a launch with a lane for each row of a canvas, which are its block positions too."""
    lanes = next_power_of_2(length)
    return {"CANVAS": length, "LANES": lanes, "num_warps": max(1, lanes // LANES_PER_WARP)}
