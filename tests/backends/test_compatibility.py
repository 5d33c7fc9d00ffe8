"""Engines that run elsewhere: which modes exist for whom, what a build says of their price, and what the builder is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorrt_rtx
from backend_models import batch, matmul_text
from onnx import parser

from deploycc.backends import nvinfer, tensorrt
from deploycc.backends.tensorrt import TensorRT
from deploycc.capability import check_compatibility
from deploycc.core.backend import BuildOptions
from deploycc.core.compatibility import MODES, parse_compatibility
from deploycc.core.errors import BackendError, UsageError
from deploycc.core.target import Target, parse_target
from deploycc.request import BuildRequest, Silent, resolve

MODEL = Path(__file__).parents[2] / "examples" / "fashion" / "cnn.onnx"


def test_modes_are_read_in_one_order() -> None:
    assert parse_compatibility("") == ()
    assert parse_compatibility("ampere-plus, version") == ("version", "ampere-plus")
    with pytest.raises(UsageError, match=r"unknown mode 'versions'.*use one of version, ampere-plus, same-arch"):
        parse_compatibility("version,versions")
    with pytest.raises(UsageError, match="ampere-plus includes same-arch"):
        parse_compatibility("same-arch,ampere-plus")


@pytest.mark.parametrize(
    ("mode", "what", "fix"),
    [
        ("version", "without the lean runtime", "build again for each version"),
        ("ampere-plus", "runs on the architectures that it is built for", "--target tensorrt-rtx:sm_80+sm_86+sm_89"),
        ("same-arch", "runs on the architectures that it is built for", "name them"),
    ],
)
def test_tensorrt_rtx_has_none_of_the_modes_and_says_what_to_do(mode: str, what: str, fix: str) -> None:
    with pytest.raises(UsageError, match=what) as refused:
        resolve(BuildRequest(MODEL, targets=("tensorrt-rtx:sm_89",), compatibility=mode), Silent())
    assert fix in refused.value.fix


def test_ampere_plus_begins_with_ampere() -> None:
    assert TensorRT().unsupported_mode(parse_target("tensorrt:sm_90"), "ampere-plus") == ""
    assert TensorRT().unsupported_mode(parse_target("tensorrt:sm_75"), "same-arch") == ""
    with pytest.raises(UsageError, match="ampere-plus begins with sm_80, and the target is sm_75"):
        check_compatibility("ampere-plus", [parse_target("tensorrt:sm_75")])


def test_a_build_states_the_price() -> None:
    prices = check_compatibility("version,ampere-plus", [parse_target("tensorrt:sm_90"), Target("onnxruntime")])
    assert [price.split(":")[0] for price in prices] == ["--compatibility version", "--compatibility ampere-plus"]
    for price, mode in zip(prices, ("version", "ampere-plus"), strict=True):
        assert MODES[mode].gains in price
        assert MODES[mode].costs in price


def test_the_builder_is_told_of_every_mode() -> None:
    config = tensorrt_rtx.Builder(tensorrt_rtx.Logger()).create_builder_config()
    nvinfer.set_compatibility(tensorrt_rtx, config, ())
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.VERSION_COMPATIBLE)
    nvinfer.set_compatibility(tensorrt_rtx, config, ("version",))
    assert config.get_flag(tensorrt_rtx.BuilderFlag.VERSION_COMPATIBLE)
    levels = []

    class Config:
        hardware_compatibility_level = property(fset=lambda _, level: levels.append(level.name))

    for mode in MODES:
        nvinfer.set_compatibility(tensorrt_rtx, Config() if mode != "version" else config, (mode,))
    assert levels == ["AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY"]


def test_the_builder_of_tensorrt_rtx_itself_lacks_the_lean_runtime(tmp_path: Path) -> None:
    """Why the mode is refused before anything is built: should this pass one day, the refusal can go."""
    (tmp_path / "m.onnx").write_bytes(parser.parse_model(matmul_text("fp16")).SerializeToString())
    options, target = BuildOptions(compatibility=("version",)), Target("tensorrt-rtx", ("sm_89",))
    with pytest.raises(BackendError, match="libnvinfer_lean"):
        nvinfer.build(
            "tensorrt_rtx", tmp_path / "m.onnx", target, out=tmp_path / "e", profiles=batch(64), options=options, base=60, archs=("sm_89",)
        )


def test_a_target_without_architecture_means_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "present_arch", lambda: 90)
    assert TensorRT().resolve(Target("tensorrt")) == Target("tensorrt", ("sm_90",))
    assert TensorRT().resolve(Target("tensorrt", ("sm_89",))) == Target("tensorrt", ("sm_89",))
    monkeypatch.setattr(tensorrt, "present_arch", lambda: None)
    assert TensorRT().resolve(Target("tensorrt")) == Target("tensorrt")
