"""Raw ranges as a file: what one pass over the data saw, so that another method or format needs no second pass."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from deploycc.core.rescaling import Rescale
from deploycc.quant.calibrate import Statistics
from deploycc.quant.observers import Histogram, Observer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RANGES = "ranges.npz"
SCHEMA = "deploycc.ranges/1"


def save_ranges(path: Path, statistics: Statistics, rescales: Mapping[str, Rescale], *, key: str) -> None:
    """Write extremes, histograms and the rescales of the graph that was observed; same statistics, same bytes.

    ``key`` says of which graph, data and way of observing they are: whoever reads them must name the same.
    """
    observers = list(statistics.observers.values())
    head = {"schema": SCHEMA, "key": key, "samples": statistics.samples, "rescales": {n: asdict(r) for n, r in rescales.items()}}
    np.savez_compressed(
        path,
        head=np.array(json.dumps(head)),
        names=np.array(list(statistics.observers), dtype=np.str_),
        low=np.array([o.low for o in observers]),
        high=np.array([o.high for o in observers]),
        exponent=np.array([o.histogram.exponent for o in observers]),
        counts=np.array([o.histogram.counts for o in observers]),
    )


def load_ranges(path: Path, *, key: str) -> tuple[Statistics, dict[str, Rescale]] | None:
    """Return the statistics and rescales of ``key``, or None where the file has others, is damaged or does not exist."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            head = json.loads(str(file["head"]))
            if (head["schema"], head["key"]) != (SCHEMA, key):
                return None
            rows = zip(file["names"], file["low"], file["high"], file["exponent"], file["counts"], strict=True)
            observers = {str(n): Observer(float(low), float(high), Histogram(int(e), c)) for n, low, high, e, c in rows}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    rescales = {n: Rescale(tuple(r["scale"]), tuple(r["shift"]), r["k"], r["gain_db"]) for n, r in head["rescales"].items()}
    return Statistics(observers, head["samples"], 0.0, cached=True), rescales
