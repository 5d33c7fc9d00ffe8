"""Where the classes of an output lie."""

from __future__ import annotations

from collections.abc import Sequence


def class_axis(shape: Sequence[int]) -> int | None:
    """Return the axis of the classes: the second of ``[N, C]`` and ``[N, C, H, W]``, the last of ``[N, T, C]``; None for one class."""
    axis = {2: 1, 3: 2}.get(len(shape), 1 if len(shape) > 3 else None)
    return None if axis is None or shape[axis] == 1 else axis
