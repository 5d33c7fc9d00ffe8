"""What is done behind a LayerNormalization in paper mode: four ways whose difference LRP-QViT and RepQ-ViT measure.

    layer    one quantizer for all channels
    channel  one per channel, which no engine has
    repq     calibrated per channel, then s~ = mean(s), z~ = round(mean(z)): the codes stay those of ``channel``, with one quantizer
    crl      calibrated per channel, then s^ and z^ = s and z clipped to mean +- k standard deviations, kept per channel

For the last two r1 = s / s', r2 = z - z', gamma' = gamma / r1, beta' = (beta + s r2) / r1, W' = W diag(r1), b' = b - W (s r2): the codes
are those of ``channel``, and what differs is the weight, which is quantized afterwards. (LRP-QViT, arXiv 2401.11243; RepQ-ViT, arXiv
2212.08254. The k of the former is not known with certainty; 2 is the default here.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deploycc.core.errors import UsageError
from deploycc.core.rescaling import Rescale
from deploycc.core.simulation import Uniform

DEFAULT = "crl"


@dataclass(frozen=True, slots=True)
class Reparameterization:
    """What is done behind a LayerNormalization; ``k`` is the clipping of ``crl`` in standard deviations."""

    kind: str
    k: float = 2.0


def parse_reparameterization(text: str) -> Reparameterization:
    """Read ``layer``, ``channel``, ``repq``, ``crl`` or ``crl:K``.

    Raises:
        UsageError: for anything else.
    """
    kind, colon, number = text.partition(":")
    try:
        k = float(number) if colon else 2.0
    except ValueError:
        k = -1.0
    if kind not in {"layer", "channel", "repq", "crl"} or (colon and kind != "crl") or not 0 < k < math.inf:
        raise UsageError(
            f"unknown reparameterization '{text}'", at="--reparam", fix="use layer, channel, repq, crl or crl:K with K above 0"
        )
    return Reparameterization(kind, k)


def reparameterized(before: Uniform, to: Reparameterization) -> Uniform:
    """Return the quantizer that takes the place of ``before``, which has one scale and one zero point per channel."""
    scale, zero = np.array(before.scale), np.array(before.zero_point, np.float64)
    if to.kind == "channel":
        return before
    if to.kind == "repq":
        return Uniform(before.bits, (float(np.float32(scale.mean())),), (round(float(zero.mean())),))
    low, high = scale.mean() - to.k * scale.std(), scale.mean() + to.k * scale.std()
    clipped = np.clip(scale, max(low, float(scale.min())), high).astype(np.float32)
    zeros = np.rint(np.clip(zero, zero.mean() - to.k * zero.std(), zero.mean() + to.k * zero.std()))
    return Uniform(before.bits, tuple(clipped.tolist()), tuple(zeros.astype(np.int64).tolist()))


def rescale_between(before: Uniform, after: Uniform) -> Rescale:
    """Return the rescale under which ``after`` gives the codes of ``before``: x' = (x + s r2) / r1."""
    scale, zero = np.array(before.scale), np.array(before.zero_point)
    factor, offset = scale / np.array(after.scale), scale * (zero - np.array(after.zero_point))
    return Rescale(tuple((1 / factor).tolist()), tuple((0.0 - offset).tolist()))
