"""Decoding parameters: their defaults, where they come from, and what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

MODES = ("parallel", "serial")
INFILLS = ("propose", "correct")
SLOT_STARTS = ("mask", "next")
LEAST_SERIAL_ROWS = 16  # of a request in serial mode, in every step
FIRST_MASKS = 8  # of serial decoding, fed with the end of a prompt
MOST_OF_SLOT = 2**20  # in serial mode; the device counts positions in 32 bits


class ParameterError(ValueError):
    """A decoding parameter is unknown or out of range; names it, its value and what is allowed."""

    def __init__(self, parameter: str, value: Any, allowed: str) -> None:
        super().__init__(f"{parameter}={value!r} is not supported: {allowed}.")
        self.parameter = parameter
        self.value = value


def _check_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ParameterError(name, value, "allowed is an integer of at least 1")
    return value


def _check_threshold(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0.0 <= value <= 1.0:
        raise ParameterError(name, value, "allowed is a probability between 0 and 1")
    return float(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ParameterError(name, value, f"allowed are {' and '.join(map(repr, choices))}")


@dataclass(frozen=True)
class DecodingParams:
    """How one request is decoded (algorithm section 2). The defaults are the paper's GSM8K preset.

    Attributes:
        mode: "parallel" (section 3) or "serial" (section 7: token by token, drafted by masks).
        slot_size: tokens per slot (the published checkpoint is trained with 4, 8, 16 and 32).
        block_length: tokens per block, a multiple of ``slot_size``; blocks go left to right.
        slot_threshold: a slot is chosen when the probability of its first token exceeds this.
        token_threshold: a drafted token is accepted when its probability exceeds this.
        infill: what an infill accepts without a test: the first token that masks "propose", or the
            one picked in place of a token that failed, to "correct" it (section 8).
        slot_start: where serial decoding picks a slot's first token: in the row of a "mask", or in
            that of the token before it, as any "next" token. Said by the checkpoint.

    Raises:
        ParameterError: a value has the wrong type or lies outside its range.
    """

    mode: str = field(default="parallel", kw_only=True)
    slot_size: int = 32
    block_length: int = 128
    slot_threshold: float = 0.9
    token_threshold: float = 0.4
    infill: str = field(default="propose", kw_only=True)
    slot_start: str = field(default="mask", kw_only=True)

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, MODES)
        _check_choice("infill", self.infill, INFILLS)
        _check_choice("slot_start", self.slot_start, SLOT_STARTS)
        _check_count("slot_size", self.slot_size)
        _check_count("block_length", self.block_length)
        for name in ("slot_threshold", "token_threshold"):
            object.__setattr__(self, name, _check_threshold(name, getattr(self, name)))
        if self.mode == "parallel" and self.block_length % self.slot_size:
            raise ParameterError(
                "block_length",
                self.block_length,
                f"allowed is a multiple of slot_size={self.slot_size}",
            )

    def updated(self, values: Mapping[str, Any] | None) -> DecodingParams:
        """These parameters with ``values`` (name -> value) in place of some of them.

        ``preset`` names one of ``PRESETS``: all its values, then what ``values`` says otherwise.
        ``trace`` (see ``vllm_refusion.decoding.trace``) and ``drafts`` do not change the output.

        Raises:
            ParameterError: a name is not a decoding parameter, or a value is out of range.
        """
        if not values:
            return self
        for name, value in values.items():
            if name not in OPTION_NAMES:
                raise ParameterError(name, value, f"known names are {', '.join(OPTION_NAMES)}")
        return replace(self, **expand_preset(values))

    def of_request(self, values: Mapping[str, Any] | None) -> DecodingParams:
        """These defaults with what a request says in place of some of them.

        Raises:
            ParameterError: as ``updated``; or the request sets what its mode does not use, or what
                only a checkpoint can know.
        """
        params = self.updated(values)
        if "slot_start" in (values or {}):
            raise ParameterError(
                "slot_start",
                params.slot_start,
                f"a checkpoint trained for it says it, and this server's is {self.slot_start!r}; "
                "allowed is to leave it out, or another server, started with "
                "--override-generation-config '{\"slot_start\": ...}'",
            )
        for name in OF_PARALLEL if params.mode == "serial" else ():
            if name in (values or {}):
                allowed = "it has no effect beside mode='serial'; allowed is to leave it out"
                raise ParameterError(name, (values or {})[name], allowed)
        return params

    def check_canvas(self, canvas_length: int) -> None:
        """Raises ParameterError when a block does not fit the served canvas of that many tokens.

        In serial mode, which has no blocks, when a slot is longer than any response.
        """
        if self.mode == "serial" and self.slot_size > MOST_OF_SLOT:
            allowed = f"allowed is at most {MOST_OF_SLOT}"
            raise ParameterError("slot_size", self.slot_size, allowed)
        if self.mode == "parallel" and self.block_length > canvas_length:
            raise ParameterError(
                "block_length",
                self.block_length,
                f"allowed is at most the served canvas of {canvas_length} tokens, which is set at "
                "start with --diffusion-config '{\"canvas_length\": ...}'",
            )

    def budget(self, max_tokens: int) -> int:
        """``max_tokens`` rounded up to whole slots: the response positions that are decoded."""
        return -(-max_tokens // self.slot_size) * self.slot_size

    def whole_slots(self, tokens: int) -> int:
        """``tokens`` rounded down to whole slots. Of a response cut inside a slot, that slot's
        tokens may have been delivered before they are committed: only those of whole slots are.
        """
        return tokens - tokens % self.slot_size

    @property
    def least_rows(self) -> int:
        """Rows that a running request should get in every step."""
        return self.block_length if self.mode == "parallel" else LEAST_SERIAL_ROWS

    def first_rows(self, max_tokens: int) -> int:
        """Rows of the first canvas, which may be fed with the end of the prompt.

        In parallel mode the masks of the first block; in serial mode a few masks, behind the
        prompt's last token where its row picks the first token.
        """
        if self.mode == "parallel":
            return min(self.block_length, self.budget(max_tokens))
        return min(FIRST_MASKS, max_tokens) + (self.slot_start == "next")


PARAMETER_NAMES = tuple(entry.name for entry in fields(DecodingParams))
PRESET_NAMES = ("slot_size", "block_length", "slot_threshold", "token_threshold")
# Without effect in serial mode.
OF_PARALLEL = (*PRESET_NAMES[1:], "infill", "preset")
OPTION_NAMES = (*PARAMETER_NAMES, "preset", "trace", "drafts")  # what extra_args may hold


def add_options(parser: argparse._ActionsContainer, prefix: str = "") -> None:
    """Gives a command an option for each decoding parameter; one that is not given is None."""
    for entry in fields(DecodingParams):
        option = f"--{prefix}{entry.name}".replace("_", "-")
        parser.add_argument(option, type=type(entry.default))


def given_options(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """The decoding parameters, and the preset, that a command was given, by name."""
    values = {name: getattr(args, prefix + name) for name in ("preset", *PARAMETER_NAMES)}
    return {name: value for name, value in values.items() if value is not None}


# The published settings (algorithm section 2).
PRESETS = {
    "gsm8k": DecodingParams(32, 128, 0.9, 0.4),
    "math": DecodingParams(32, 64, 0.8, 0.6),
    "mbpp": DecodingParams(32, 128, 0.9, 0.3),
    "humaneval": DecodingParams(32, 128, 0.9, 0.4),
    "gpqa": DecodingParams(8, 16, 0.8, 0.2),
    "arc-c": DecodingParams(8, 8, 0.8, 0.1),
    "mmlu-pro": DecodingParams(16, 128, 0.9, 0.4),
}


def expand_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Decoding parameters by name: those of ``values["preset"]``, if any, under the others.

    Raises:
        ParameterError: there is no preset of that name.
    """
    own = {name: value for name, value in values.items() if name in PARAMETER_NAMES}
    if "preset" not in values:
        return own
    name = values["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise ParameterError("preset", name, f"allowed presets are {', '.join(PRESETS)}")
    return {part: getattr(PRESETS[name], part) for part in PRESET_NAMES} | own
