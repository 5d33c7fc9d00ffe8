"""RepQ and CRL: by hand, exact as functions, and equal in codes to quantization per channel."""

from __future__ import annotations

import numpy as np
import pytest

from deploycc.core.errors import UsageError
from deploycc.core.simulation import Uniform, fit_uniform
from deploycc.quant.paper_reparameterize import Reparameterization, parse_reparameterization, reparameterized, rescale_between

RNG = np.random.default_rng(5)
OUTLIERS = np.where(np.arange(48) % 16 == 3, 20.0, 1.0)


def normalized() -> np.ndarray:
    """Return rows as behind a LayerNormalization, four channels of which are twenty times larger."""
    return (RNG.standard_normal((400, 48)) + RNG.standard_normal(48)) * OUTLIERS


def test_repq_by_hand() -> None:
    """s = 1, 3 and z = 2, 8: s~ = 2, z~ = 5, r1 = 1/2, 3/2, s r2 = -3, 9."""
    before = Uniform(4, (1.0, 3.0), (2, 8))
    after = reparameterized(before, Reparameterization("repq"))
    assert after == Uniform(4, (2.0,), (5,))
    rescale = rescale_between(before, after)
    assert rescale.scale == pytest.approx((2, 2 / 3))
    assert rescale.shift == pytest.approx((3, -9))


def test_crl_by_hand() -> None:
    """Scales 1, 1, 1, 5: mean 2, deviation sqrt 3; at k = 1 the last becomes 3.732. Zero points 0, 0, 0, 8: mean 2, at most 5.464."""
    before = Uniform(4, (1.0, 1.0, 1.0, 5.0), (0, 0, 0, 8))
    after = reparameterized(before, Reparameterization("crl", 1.0))
    assert after.scale == pytest.approx((1, 1, 1, 2 + 3**0.5))
    assert after.zero_point == (0, 0, 0, 5)
    rescale = rescale_between(before, after)
    assert rescale.scale == pytest.approx((1, 1, 1, (2 + 3**0.5) / 5))
    assert rescale.shift == pytest.approx((0, 0, 0, -15))


def test_channel_changes_nothing() -> None:
    before = fit_uniform(normalized(), 4, axis=1)
    assert reparameterized(before, Reparameterization("channel")) is before


@pytest.mark.parametrize("way", ["repq", "crl", "crl:1", "crl:3"])
@pytest.mark.parametrize("bits", [4, 6])
class TestEveryReparameterization:
    def test_the_codes_are_those_of_channel(self, way: str, bits: int) -> None:
        x = normalized()
        before = fit_uniform(x, bits, axis=1)
        after = reparameterized(before, parse_reparameterization(way))
        rescale = rescale_between(before, after)
        moved = (x - np.array(rescale.shift)) * np.array(rescale.scale)
        assert np.array_equal(after.codes(moved), before.codes(x))
        assert len(after.scale) == (1 if way == "repq" else 48)

    def test_the_function_stays(self, way: str, bits: int) -> None:
        """W' X' + b' = W X + b, with W' = W diag(r1) and b' = b - W (s r2)."""
        x, w, b = normalized(), RNG.standard_normal((48, 16)), RNG.standard_normal(16)
        before = fit_uniform(x, bits, axis=1)
        rescale = rescale_between(before, reparameterized(before, parse_reparameterization(way)))
        scale, shift = np.array(rescale.scale), np.array(rescale.shift)
        moved = ((x - shift) * scale) @ (w / scale[:, None]) + (b + shift @ w)
        assert np.abs(moved - (x @ w + b)).max() < 1e-10

    def test_the_outliers_move_into_the_weight(self, way: str, bits: int) -> None:
        before = fit_uniform(normalized(), bits, axis=1)
        scale = np.array(rescale_between(before, reparameterized(before, parse_reparameterization(way))).scale)
        assert scale[OUTLIERS > 1].max() < 1


@pytest.mark.parametrize("text", ["", "token", "repq:2", "crl:", "crl:x", "crl:0", "crl:-1", "crl:nan", "crl:inf"])
def test_what_is_no_reparameterization(text: str) -> None:
    with pytest.raises(UsageError, match="unknown reparameterization") as refused:
        parse_reparameterization(text)
    assert refused.value.at == "--reparam"


def test_the_default_of_k_is_two() -> None:
    assert parse_reparameterization("crl") == Reparameterization("crl", 2.0)
    assert parse_reparameterization("crl:2.5") == Reparameterization("crl", 2.5)
