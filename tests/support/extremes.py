"""Numbers at the ends of their types, for every field that has room for one."""

from __future__ import annotations

import types
import typing
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel
from vllm.exceptions import VLLMClientError

from vllm_refusion.decoding.params import OPTION_NAMES

INTS = [
    *(-(10**30), -(2**63) - 1, -(2**63), -(2**63) + 1, -(2**32), -(2**31) - 1, -(2**31), -2, -1),
    *(0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 2, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
]
FLOATS = [
    *(float("nan"), float("inf"), -float("inf"), 1.7e308, -1.7e308, 1e39, 3.4e38, -3.4e38, 1e30),
    *(-1e30, 5e-324, -5e-324, 1e-45, -0.0, 0.0, 1.0, 1 + 1e-15),
]


def values(hint: Any) -> list[Any]:
    """Extreme values of a type: numbers wherever it has room for one.

    ``Any`` in a dictionary of names stands for the options of decoding; a pydantic model is a
    dictionary with one of its fields.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        return INTS
    if hint is float:
        return [*FLOATS, *INTS]
    if hint is np.ndarray:
        return [[[value]] for value in INTS]
    if hint is Any:
        return [*INTS, *FLOATS]
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return [value for one in arguments for value in values(one)]
    if origin in (list, set):
        return [origin([value]) for value in values(arguments[0])]
    if origin is dict and arguments[0] is str:
        return [{name: value} for name in OPTION_NAMES for value in values(arguments[1])]
    if origin is dict:
        keys = [{key: 1} for key in values(arguments[0])]
        return keys + [{5: value} for value in values(arguments[1])]
    if is_dataclass(hint) and hint.__module__.startswith("vllm"):
        hints = typing.get_type_hints(hint)
        made = []
        for field in fields(hint):
            for value in values(hints[field.name]):
                with suppress(VLLMClientError, ValueError, TypeError):
                    made.append(hint(**{field.name: value}))
        return made
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        fields_of = hint.model_fields.items()
        return [{name: value} for name, f in fields_of for value in values(f.annotation)]
    return []
