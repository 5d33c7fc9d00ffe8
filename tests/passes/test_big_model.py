"""Folding weights of a model in external data takes little more memory than the model itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploycc.core.graph import widened

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "big_model.py"


@pytest.mark.slow
def test_three_gigabytes_stay_below_the_limit() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--gigabytes", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def external(folder: Path) -> ir.Value:
    np.arange(8, dtype=np.float32).tofile(folder / "w.data")
    tensor = ir.ExternalTensor("w.data", 0, 32, ir.DataType.FLOAT, shape=ir.Shape([8]), name="w", base_dir=folder)
    value = ir.Value(name="w", const_value=tensor)
    ir.Graph([], [], nodes=[], initializers=[value])
    return value


def test_a_weight_that_was_read_is_unmapped(tmp_path: Path) -> None:
    value = external(tmp_path)
    found = widened(value)
    assert found is not None
    assert found.dtype == np.float64
    assert found.tolist() == list(range(8))
    assert isinstance(value.const_value, ir.ExternalTensor)
    assert value.const_value.raw is None


def test_a_weight_that_somebody_holds_stays_readable(tmp_path: Path) -> None:
    value = external(tmp_path)
    assert value.const_value is not None
    held = value.const_value.numpy()
    for _ in range(2):
        assert widened(value) is not None
    assert held.tolist() == list(range(8))
    assert value.const_value.numpy().tolist() == list(range(8))
