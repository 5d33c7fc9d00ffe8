"""The n-bit quantizers against numbers worked out by hand and against the formulas of RepQ-ViT written out."""

from __future__ import annotations

import numpy as np
import pytest

from deploycc.core.simulation import Logarithmic, Uniform, fit_logarithmic, fit_uniform, quantizer_from_json

RNG = np.random.default_rng(3)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


class TestUniform:
    def test_by_hand(self) -> None:
        """2 bits over -1..2: s = 1, z = 1, codes 0..3 stand for -1, 0, 1, 2; halves go to the even step."""
        quantizer = Uniform(2, (1.0,), (1,))
        x = np.array([-7.0, -1.2, -0.5, 0.4, 0.5, 1.5, 2.4, 9.0], np.float32)
        assert quantizer.codes(x).tolist() == [0, 0, 1, 1, 1, 3, 3, 3]
        assert quantizer.apply(x).tolist() == [-1, -1, 0, 0, 0, 2, 2, 2]

    def test_asymmetric_fit_by_hand(self) -> None:
        """Fifteen equal steps from -1 to 2: the outermost percentiles are the ends within 3e-5, so s = 3/15 and z = 5."""
        quantizer = fit_uniform(np.linspace(-1, 2, 16), 4)
        assert quantizer.scale[0] == pytest.approx(3 / 15, rel=1e-4)
        assert quantizer.zero_point == (5,)

    def test_every_channel_is_fitted_alone(self) -> None:
        x = values(500, 3) * np.array([1, 10, 0.1], np.float32) + np.array([0, 5, 0], np.float32)
        together, alone = fit_uniform(x, 4, axis=1), [fit_uniform(x[:, c], 4) for c in range(3)]
        assert together.scale == tuple(q.scale[0] for q in alone)
        assert together.zero_point == tuple(q.zero_point[0] for q in alone)
        assert np.array_equal(together.apply(x)[:, 1], alone[1].apply(x[:, 1]))

    def test_the_axis_of_a_weight(self) -> None:
        w = values(6, 5)
        by_row, by_column = fit_uniform(w, 4, axis=0), fit_uniform(w.T.copy(), 4, axis=1)
        assert by_row == by_column
        assert np.array_equal(by_row.apply(w, axis=0), by_column.apply(w.T.copy(), axis=1).T)

    def test_the_percentile_of_least_error(self) -> None:
        """One outlier among many small values: clipping it costs less than a step that reaches it; alone it would be kept."""
        x = np.append(values(200_000) * 0.1, np.float32(3.0))
        clipped = fit_uniform(x, 4)
        assert 15 * clipped.scale[0] < 1.1
        errors = {}
        for percentile in (0.999, 0.9999, 0.99999):
            high, low = np.quantile(x, percentile), np.quantile(x, 1 - percentile)
            scale = np.float32((high - low) / 15)
            zero = np.rint(-low / scale)
            built = scale * (np.clip(np.rint(x / scale) + zero, 0, 15) - zero)
            errors[float(scale)] = float(np.sum((built - x) ** 2, dtype=np.float64))
        assert clipped.scale[0] == pytest.approx(min(errors, key=errors.__getitem__), rel=1e-6)

    @pytest.mark.parametrize("number", [0.0, 3.5, -2.0])
    def test_a_constant_channel_is_kept(self, number: float) -> None:
        x = np.full((8, 1), number, np.float32)
        assert fit_uniform(x, 4, axis=1).apply(x) == pytest.approx(x, abs=1e-6)

    @pytest.mark.parametrize("bits", [3, 4, 6, 8])
    def test_the_error_is_half_a_step_in_range(self, bits: int) -> None:
        x = np.linspace(-0.3, 1, 4001, dtype=np.float32)
        quantizer = fit_uniform(x, bits)
        step = quantizer.scale[0]
        inside = (x > step * -quantizer.zero_point[0]) & (x < step * (quantizer.top - quantizer.zero_point[0]))
        assert np.abs(quantizer.apply(x) - x)[inside].max() <= step / 2 * (1 + 1e-5)
        assert len(np.unique(quantizer.codes(x))) == 2**bits


class TestLogarithmic:
    def test_by_hand(self) -> None:
        """Steps of sqrt 2 below 1: 1, 0.7071, 0.5, 0.3536 for 2 bits; what would be the fifth step is zero."""
        x = np.array([1.0, 0.8, 0.7, 0.5, 0.3536, 0.26, 0.24, 0.0], np.float32)
        quantizer = Logarithmic(2, 1.0)
        assert quantizer.codes(x).tolist() == [0, 1, 1, 2, 3, 4, 4, 4]
        assert quantizer.apply(x) == pytest.approx([1, 2**-0.5, 2**-0.5, 0.5, 2**-1.5, 0, 0, 0])

    @pytest.mark.parametrize("bits", [3, 4, 6])
    def test_it_is_log2_with_a_scale_per_parity(self, bits: int) -> None:
        """RepQ-ViT's form: s 2^(-ceil(q/2)) (sqrt 2 if q is odd else 1), and zero where q >= 2^b."""
        x, s = RNG.random(5000) ** 4, 0.9
        q = np.rint(-2 * np.log2(x / s))
        zero, q = q >= 2**bits, np.clip(q, 0, 2**bits - 1)
        wanted = np.where(zero, 0, s * 2 ** -np.ceil(q / 2) * ((q % 2) * (np.sqrt(2) - 1) + 1))
        assert np.abs(Logarithmic(bits, s).apply(x) - wanted).max() < 1e-12

    def test_the_scale_is_a_percentile(self) -> None:
        x = RNG.random(20_000).astype(np.float32) ** 8
        fitted = fit_logarithmic(x, 4)
        assert fitted.scale in [pytest.approx(float(np.quantile(x, p)), rel=1e-6) for p in (0.999, 0.9999, 0.99999)]
        others = [np.sum((Logarithmic(4, float(np.quantile(x, p))).apply(x) - x) ** 2) for p in (0.999, 0.9999, 0.99999)]
        assert np.sum((fitted.apply(x) - x) ** 2) <= min(others) * (1 + 1e-5)


def test_json_keeps_every_bit() -> None:
    for quantizer in (fit_uniform(values(50, 4), 4, axis=1), fit_logarithmic(np.abs(values(99)), 3)):
        assert quantizer_from_json(quantizer.to_json()) == quantizer
