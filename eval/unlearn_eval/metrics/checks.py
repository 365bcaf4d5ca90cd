# Copyright 2026 The trl-rkld authors. Licensed under the Apache License, Version 2.0.
"""What every metric asks of its input. Messages name the argument and the remedy, never a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def finite_array(name: str, values: Any, ndim: int | tuple[int, ...] = 1) -> np.ndarray:
    """
    Turn `values` into an array of 64-bit floats, or say what is wrong with them.

    Args:
        name (`str`):
            Name of the argument, for the message.
        values (array-like):
            Numbers, nested to depth `ndim`.
        ndim (`int` or `tuple[int, ...]`, *optional*, defaults to `1`):
            Number of dimensions asked for, or those to choose from.

    Returns:
        `np.ndarray`:
            The values: at least one, all finite.

    Raises:
        [`ValueError`]: If a value is missing, not a number, NaN or infinite, or the shape is another.
    """
    try:
        # None becomes NaN here, so a null read from JSON is reported below together with its position.
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be numbers, equally many for every item: complete the shorter ones."
        ) from None
    dimensions = ndim if isinstance(ndim, tuple) else (ndim,)
    if array.ndim not in dimensions:
        raise ValueError(
            f"`{name}` must have {' or '.join(map(str, dimensions))} dimension(s), not {array.ndim} (shape {array.shape})."
        )
    if array.size == 0:
        raise ValueError(f"`{name}` is empty (shape {array.shape}): give at least one value.")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        position = tuple(int(i) for i in bad[0])
        raise ValueError(
            f"`{name}` has {len(bad)} missing, NaN or infinite value(s) of {array.size}, the first at index "
            f"{position[0] if array.ndim == 1 else position}: score these items again, in fp32 if the model overflowed."
        )
    return array


def finite_number(name: str, value: Any) -> float:
    """`value` as a float, or a `ValueError` naming `name` if it is missing, NaN or infinite."""
    return float(finite_array(name, [value])[0])


def same_length(first_name: str, first: Sequence, second_name: str, second: Sequence) -> None:
    """Raise a `ValueError` naming both arguments and both lengths unless `first` and `second` are equally long."""
    if len(first) != len(second):
        raise ValueError(
            f"`{first_name}` has {len(first)} items and `{second_name}` {len(second)}: both must list the same items in "
            "the same order."
        )
