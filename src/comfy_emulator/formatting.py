"""How a node's inputs are shown in an error."""

from __future__ import annotations

from typing import Any

import numpy as np


def format_value(value: Any) -> Any:
    """Give plain values as they are and others as text; arrays look like the tensors that ComfyUI has instead."""
    if value is None or isinstance(value, int | float | bool | str):
        return value
    if isinstance(value, np.ndarray):
        return f"tensor({_tensor_text(value)})"
    return str(value)


def _tensor_text(array: np.ndarray[Any, Any]) -> str:
    whole = array.dtype.kind != "f" or bool(np.all(array == np.round(array)))
    return np.array2string(
        array,
        separator=", ",
        prefix="tensor(",
        precision=4,
        floatmode="maxprec" if whole else "fixed",
    )
