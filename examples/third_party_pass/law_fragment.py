"""What the pass works on, as a fragment of the random graphs that the pass laws draw (``tests/passes/random_graphs.py``)."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st


def repeated_relu(b: Any, draw: Any) -> None:
    """Append a Relu, perhaps a second reader or something that keeps the sign, and another Relu."""
    between = draw(st.sampled_from(["nothing", "transposes", "sum", "reader"]))
    first = b.node(f"Relu({b.value})")
    b.becomes(first, lipschitz=1, roundings=0, magnitude=b.magnitude)
    if between == "transposes":
        order = [0, *range(len(b.shape), 0, -1)]
        b.value, b.shape = b.node(f"Transpose<perm=[{','.join(map(str, order))}]>({b.value})"), b.shape[::-1]
    elif between == "sum":
        b.becomes(b.node(f"Add({first}, {b.node(f'Sigmoid({first})')})"), lipschitz=1.25, roundings=8, magnitude=b.magnitude + 1)
    second = b.node(f"Relu({b.value})")
    if between == "reader":
        b.becomes(b.node(f"Add({second}, {first})"), lipschitz=2, roundings=1, magnitude=2 * b.magnitude)
    else:
        b.value = second
