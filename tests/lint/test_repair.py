"""Each safe repair: what it does, what it leaves alone, and that the numbers stay what they were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from lint_graphs import CONV, FP8, codes, conv, findings, pair, places, quantized, stored
from small_graphs import check, compute, operators, random, weight

from deploycc import cli
from deploycc.core.errors import ContractError
from deploycc.interop.inspecting import read_model
from deploycc.lint import linting
from deploycc.lint.linting import checks, fix
from deploycc.lint.proof import proof
from deploycc.lint.repair import REPAIRS, repair

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deploycc.lint.subject import Subject

W = codes(32, 16, 3, 3)
X = random(2, 16, 8, 8) * 2


def repaired(model: ir.Model, *, count: int = 1) -> ir.Model:
    """Repair a clone, check it, and compare what both compute, bit by bit."""
    result = model.clone()
    assert len(repair(result)) == count
    check(result)
    feeds = {v.name or "": random(*(2 if not isinstance(d, int) else d for d in v.shape or ())) * 2 for v in model.graph.inputs}
    before, after = compute(model, **feeds), compute(result, **feeds)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    return result


def test_uint8_in_the_middle_is_int8() -> None:
    shifted = {"wq": (W["wq"].astype(np.int16) + 128).astype(np.uint8), "ws": W["ws"], "wz": np.full(32, 128, np.uint8)}
    model = quantized(CONV, **shifted, z=np.uint8(128))
    assert set(places(model, "R1")) == {"n_x_dq", "n_w"}
    result = repaired(model)
    assert places(result, "R1") + places(result, "R3") == []
    assert np.array_equal(result.graph.initializers["wq_int8"].const_value.numpy(), W["wq"])  # type: ignore[union-attr]


def test_uint8_elsewhere_stays() -> None:
    assert repair(quantized(CONV, **W, z=np.uint8(0))) == []


def test_scales_become_scalars() -> None:
    model = conv(s=np.array([0.05], np.float32), z=np.array([0], np.int8))
    assert places(model, "T2") == ["n_x_dq"]
    assert places(repaired(model), "T2") == []


BIASED = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + stored() + "%s y = Conv<pads=[1,1,1,1]>(x_d, w, b) }"


@pytest.mark.parametrize("dtype", [np.int32, np.int8])
def test_biases_become_float(dtype: type) -> None:
    bias = {"bq": np.arange(32, dtype=dtype), "bs": np.full(32, 1e-3, np.float32), "bz": np.zeros(32, dtype)}
    result = repaired(quantized(BIASED % stored("b"), **W, **bias))
    assert places(result, "R12") == []
    assert "bq_float" in result.graph.initializers


def test_a_bias_between_both_nodes_becomes_float() -> None:
    model = quantized(BIASED % pair("c", "cs", "cz", out="b"), **W, c=weight(32), cs=np.float32(0.01), cz=np.int8(0))
    assert operators(repaired(model)).count("QuantizeLinear") == 1


def test_weights_are_stored() -> None:
    text = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + pair("w", "ws", "wz") + "y = Conv<pads=[1,1,1,1]>(x_d, w_d) }"
    text = text.replace("Linear(w, ws", "Linear<axis=0>(w, ws").replace("Linear(w_dq", "Linear<axis=0>(w_dq")
    result = repaired(quantized(text, w=weight(32, 16, 3, 3), ws=W["ws"], wz=W["wz"]))
    assert operators(result).count("QuantizeLinear") == 1
    assert result.graph.initializers["w_int8"].dtype == ir.DataType.INT8


def test_weights_in_fp8_are_stored() -> None:
    text = "(float[N,32] x) => (float[N,64] y) { " + pair("x") + pair("w") + "y = MatMul(x_d, w_d) }"
    result = repaired(quantized(text, w=weight(32, 64), s=np.float32(0.01), z=FP8(0)))
    stored_codes = result.graph.initializers["w_fp8"].const_value
    assert stored_codes is not None
    assert stored_codes.numpy().dtype == ml_dtypes.float8_e4m3fn


SHARED = "(float[N,16,8,8] x) => (float[N,32,8,8] y) { " + pair("x") + pair("x", "t", out="x_e") + stored()
SHARED += "a = Conv<pads=[1,1,1,1]>(x_d, w) b = Conv<pads=[1,1,1,1]>(x_e, w) y = Add(a, b) }"


def test_equal_pairs_are_joined() -> None:
    assert operators(repaired(quantized(SHARED, **W, t=np.float32(0.05)))).count("QuantizeLinear") == 1
    assert repair(quantized(SHARED, **W, t=np.float32(0.06))) == []


def test_repeated_and_unread_pairs_go() -> None:
    again = CONV.replace(pair("x"), pair("x", out="x0") + pair("x0", out="x_d") + pair("x", "t", out="lost"))
    assert operators(repaired(quantized(again, **W, t=np.float32(0.07)))).count("QuantizeLinear") == 1


def test_pairs_move_behind_pooling() -> None:
    text = "(float[N,16,8,8] x) => (float[N,32,4,4] y) { " + pair("x") + stored("u") + "c = Conv<pads=[1,1,1,1]>(x_d, u) r = Relu(c) "
    text += pair("r") + "p = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r_d) "
    text += stored() + "y = Conv<pads=[1,1,1,1]>(p, w) }"
    model = quantized(text, **W | codes(32, 16, 3, 3, name="u") | codes(32, 32, 3, 3))
    assert places(model, "P14") == ["n_r_d"]
    result = repaired(model)
    assert places(result, "P14") == []
    pool = next(n for n in result.graph if n.op_type == "MaxPool")
    assert [u.node.op_type for u in pool.outputs[0].uses()] == ["QuantizeLinear"]


@pytest.mark.parametrize(("narrow", "wide", "count"), [("float16", "1", 1), ("float", "10", 0)])
def test_casts_go_where_the_first_only_widens(narrow: str, wide: str, count: int) -> None:
    back = {"float16": "10", "float": "1"}[narrow]
    text = f"({narrow}[N,16] x) => ({narrow}[N,16] y) {{ a = Cast<to={wide}>(x) b = Cast<to={back}>(a) y = Neg(b) }}"
    model = quantized(text)
    assert places(model, "X5") == ["n_b"]
    assert len(repair(model)) == count
    assert operators(model) == (["Neg"] if count else ["Cast", "Cast", "Neg"])


def test_every_repair_belongs_to_a_rule() -> None:
    assert {c.repair for c in checks().values() if c.repair} == set(REPAIRS)


def test_a_repair_that_changes_numbers_is_refused() -> None:
    with pytest.raises(ContractError, match="moves by"):
        proof(conv(), conv(s=np.float32(0.5)))


def test_a_file_is_repaired_beside_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    ir.save(conv(s=np.array([0.05], np.float32), z=np.array([0], np.int8)), path)
    before = path.read_bytes()
    monkeypatch.setattr("sys.argv", ["deploycc", "lint", str(path), "--fix"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert "fixed: Scales of activations with the shape [1] became scalars (x)" in said
    assert "compared with the original on 2 random inputs: outputs differ by 0 of their range" in said
    assert path.read_bytes() == before
    assert findings(read_model(tmp_path / "model.fixed.onnx"), "T2") == []


def test_nothing_is_written_when_the_comparison_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(subject: Subject) -> Iterator[str]:
        """Spoiled."""
        value = subject.graph.initializers["s"]
        value.const_value = ir.tensor(np.float32(0.5), name="s")
        yield "s"

    path = tmp_path / "model.onnx"
    ir.save(conv(), path)
    monkeypatch.setitem(REPAIRS, "spoil", spoil)
    with pytest.raises(ContractError):
        fix(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    assert linting.lint(path).exit_code == 0
