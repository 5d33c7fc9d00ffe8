"""How far a range reaches: min-max, percentile, entropy and MSE, each from the same streamed statistics.

A method turns an ``Observer`` into the largest magnitude that INT8 should represent. The choice concerns INT8 only: FP8 has a floating
step, so a smaller range buys no finer one and its limit is the maximum itself (rule F8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from deploycc.core.errors import UsageError
from deploycc.core.formats import INT8, Format
from deploycc.core.quantizers import largest_code
from deploycc.quant.observers import BINS

if TYPE_CHECKING:
    from deploycc.quant.observers import Observer

CODES = int(largest_code(INT8))
TRIALS = 80
LOWEST_TRIAL = 0.2
METHODS = "auto, mse, minmax, entropy, percentile or percentile:P"
AUTO = "auto"


class Clipping(Protocol):
    """A way to choose the limit of an INT8 range; ``str`` gives the name by which the command line knows it."""

    def limit(self, observer: Observer) -> float:
        """Return the largest magnitude that INT8 should represent, at most the largest seen."""
        ...


@dataclass(frozen=True, slots=True)
class MinMax:
    """The largest magnitude seen: nothing saturates."""

    def limit(self, observer: Observer) -> float:
        """Return the largest magnitude."""
        return observer.limit

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True, slots=True)
class Percentile:
    """The magnitude that ``percent`` of the sampled elements do not exceed, interpolated within its bin."""

    percent: float = 99.99

    def limit(self, observer: Observer) -> float:
        """Return the percentile; the largest magnitude for 100."""
        cumulative = np.cumsum(observer.histogram.counts)
        wanted = cumulative[-1] * self.percent / 100.0
        if self.percent == 100.0 or wanted == 0.0:
            return observer.limit
        last = int(np.searchsorted(cumulative, wanted))
        within = 1.0 - (cumulative[last] - wanted) / observer.histogram.counts[last]
        return float(min((last + within) * observer.histogram.width, observer.limit))

    def __str__(self) -> str:
        return f"percentile:{self.percent:g}"


@dataclass(frozen=True, slots=True)
class Entropy:
    """The limit whose quantized distribution tells least apart from the clipped one (Migacz, GTC 2017, "8-bit inference with TensorRT").

    For a limit of i bins, P is the histogram with everything above counted in bin i-1, and Q spreads what each INT8 code collects of the
    histogram, without that, over the bins of the code that P fills: KL(P, Q) = sum of P ln(P / Q) grows with what is clipped and with
    what rounding makes alike. Codes are those of ``QuantizeLinear``, of which zero covers half a step. Zeros are exact in any scale, so
    bin 0 counts no more than bin 1.
    """

    def limit(self, observer: Observer) -> float:
        """Return the limit of least divergence among those of at least one bin per code."""
        histogram = observer.histogram
        size = min(BINS, int(observer.limit / histogram.width) + 1)
        counts = histogram.counts.astype(np.float64)
        counts[0] = min(counts[0], counts[1])
        if size <= CODES or not counts.any():
            return observer.limit
        sizes = np.unique(np.geomspace(CODES + 1, size, 512).astype(np.int64))
        best = sizes[int(np.argmin(divergences(counts, sizes)))]
        return float(min(best * histogram.width, observer.limit))

    def __str__(self) -> str:
        return "entropy"


@dataclass(frozen=True, slots=True)
class Mse:
    """The limit of least mean squared error, rounding against saturation, among ``TRIALS`` between 0.2 and 1 of the largest magnitude."""

    def limit(self, observer: Observer) -> float:
        """Return the limit of least error; the largest magnitude where nothing was sampled."""
        counts, limit = observer.histogram.counts, observer.limit
        if limit == 0.0 or not counts.any():
            return limit
        trials = limit * np.linspace(1.0, LOWEST_TRIAL, TRIALS)
        return float(trials[int(np.argmin(squared_errors(counts, trials / observer.histogram.width)))])

    def __str__(self) -> str:
        return "mse"


DEFAULT = Mse()
# Among these `auto` takes the one with the least measured noise at the outputs. Of the tensors by themselves MSE errs least; where layers
# compound what saturates, as in deep networks with heavy tails, nothing may.
CANDIDATES: tuple[Clipping, ...] = (DEFAULT, MinMax())


def clip_limit(observer: Observer, format: Format, using: Clipping = DEFAULT) -> float:
    """Return the range limit of an activation: by ``using`` for INT8, the largest magnitude for FP8."""
    return using.limit(observer) if format == INT8 else observer.limit


def parse_clipping(text: str, *, at: str) -> Clipping | None:
    """Return the method that ``text`` names, one of ``METHODS``; None for ``auto``.

    Raises:
        UsageError: for another name, or a percentile outside (0, 100].
    """
    name, _, number = text.partition(":")
    plain: dict[str, Clipping] = {"minmax": MinMax(), "entropy": Entropy(), "mse": Mse(), "percentile": Percentile()}
    if text in plain or text == AUTO:
        return plain.get(text)
    if name != "percentile":
        raise UsageError(f"unknown way of calibration '{text}'", at=at, fix=f"use one of {METHODS}")
    try:
        percent = float(number)
    except ValueError:
        percent = 0.0
    if not 0.0 < percent <= 100.0:
        fix = "write percentile:P with P above 0 and at most 100, e.g. percentile:99.99"
        raise UsageError(f"'{number}' is no percentile", at=at, fix=fix)
    return Percentile(percent)


def divergences(counts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return KL(P, Q) in nats for limits of ``sizes`` bins, as ``Entropy`` defines them, of counts ``[bins]``.

    The sums over bins are differences of running sums at the borders of codes, so that a limit costs as much as there are codes.
    """
    borders = _borders(sizes)
    borders[:, -1] = sizes
    total, inside, last = counts.sum(), _running(counts)[sizes], counts[sizes - 1]
    filled = _running(counts > 0)[borders]
    clipped = total - inside
    mass, bins = np.diff(_running(counts)[borders]), np.diff(filled)
    bins[:, -1] += (clipped > 0) & (last == 0)
    reference = mass.copy()
    reference[:, -1] += clipped
    own = _running(_product(counts, counts))[sizes - 1] + _product(last + clipped, last + clipped)
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(reference > 0, reference * np.log(mass / (bins * inside[:, None])), 0.0).sum(1)
    return np.asarray((own - cross) / total - np.log(total))


def squared_errors(counts: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return the squared error of INT8 for ``limits`` in bins, summed over counts ``[bins]``, in squares of a bin's width."""
    centers = np.arange(len(counts)) + 0.5
    borders = np.minimum(_borders(limits), len(counts))
    borders[:, -1] = len(counts)
    codes = (limits / CODES)[:, None] * np.arange(CODES + 1)
    zeroth, first, second = (np.diff(_running(counts * centers**k)[borders]) for k in range(3))
    return np.asarray((second - 2 * codes * first + codes**2 * zeroth).sum(1))


def _borders(limits: np.ndarray) -> np.ndarray:
    """Return the first bin of each code, ``[limits, codes + 1]``; a bin belongs to the code nearest to its middle. Callers set the end."""
    odd = 2.0 * np.arange(CODES + 2) - 1.0
    first = np.ceil((limits[:, None] * odd - CODES) / (2 * CODES))
    return np.asarray(np.maximum(first, 0), np.int64)


def _running(values: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, ... values."""
    return np.asarray(np.concatenate([[0], np.cumsum(values)]))


def _product(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Return ``values * ln(of)``, zero where values are."""
    return np.asarray(np.where(values > 0, values * np.log(np.maximum(of, 1e-300)), 0.0))
