"""Values as text: as Python prints them in ComfyUI, where arrays are torch tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_LINE_WIDTH = 80


def describe(value: object) -> str:
    """Return `str(value)` as ComfyUI prints it: arrays in dictionaries, lists and tuples look like tensors."""
    return _describe(value) if isinstance(value, (np.ndarray, Mapping, list, tuple)) else str(value)


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return tensor_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_describe(item) for item in value) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(_describe(item) for item in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def tensor_text(array: npt.NDArray[Any]) -> str:
    """Return an array as torch prints a tensor: four decimals, long ones abbreviated (`torch/_tensor_str.py`)."""
    whole = bool(np.all(array == np.floor(array))) if np.issubdtype(array.dtype, np.floating) else True
    text = np.array2string(
        array,
        max_line_width=_LINE_WIDTH,
        precision=4,
        separator=", ",
        prefix="tensor(",
        threshold=1000,
        edgeitems=3,
        floatmode="maxprec" if whole else "fixed",
    )
    return f"tensor({text})"
