"""Triton repositories, against Triton's own protobuf schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploycc.core.errors import UsageError
from deploycc.serve.bundle import Bundled, BundleRequest, bundle
from deploycc.serve.pbtxt import Word, write
from deploycc.serve.triton import TritonOptions, config, write_repository

schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install --no-deps -r tests/serve/requirements.txt")


def parse(text: str) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(text, schema.ModelConfig())


def manifest(*, batch: bool = True) -> dict[str, Any]:
    """Return a manifest with a static and a dynamic dimension, for GPUs of three architectures."""
    sizes = {"minimum": [1, 3, 32], "optimum": [4, 3, 64], "maximum": [16, 3, 128]}
    engines = {"engines/a.engine": ["sm_89"], "engines/b.engine": ["sm_120", "sm_90"]}
    return {
        "name": "net",
        "inputs": [{"name": "x", "datatype": "FP16", "shape": [-1, 3, -1], **sizes}],
        "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1, 10]}, {"name": "z", "datatype": "FP32", "shape": [-1]}],
        "batch": {"minimum": 1, "optimum": 4, "maximum": 16} if batch else None,
        "labels": "labels.txt",
        "files": {},
        "variants": [
            {"kind": "tensorrt", "path": path, "requires": {"version": "10.16.1.11", "archs": archs, "plugins": []}}
            for path, archs in engines.items()
        ],
    }


DEFAULT = TritonOptions()


def message(options: TritonOptions = DEFAULT, *, kind: str = "tensorrt", batch: bool = True) -> Any:
    given = manifest(batch=batch)
    return parse(write(config(given, "net", kind, given["variants"], options)))


@pytest.fixture(scope="module")
def bundled(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundled:
    return bundle(BundleRequest(built, out=tmp_path_factory.mktemp("triton") / "net.bundle"))


class TestConfig:
    def test_shapes_come_from_the_profiles_without_the_batch(self) -> None:
        found = message()
        assert (found.max_batch_size, list(found.input[0].dims), found.input[0].data_type) == (16, [3, -1], schema.TYPE_FP16)
        assert (list(found.output[0].dims), found.output[0].data_type, found.output[0].label_filename) == (
            [10],
            schema.TYPE_INT64,
            "labels.txt",
        )
        assert list(found.dynamic_batching.preferred_batch_size) == [4, 16]

    def test_a_batch_of_scalars_is_reshaped(self) -> None:
        scalar = message().output[1]
        assert (list(scalar.dims), scalar.HasField("reshape"), list(scalar.reshape.shape)) == ([1], True, [])

    def test_one_directory_serves_several_architectures(self) -> None:
        found = message()
        assert dict(found.cc_model_filenames) == {"8.9": "a.engine", "12.0": "b.engine", "9.0": "b.engine"}
        assert (found.backend, found.default_model_filename) == ("tensorrt", "a.engine")

    def test_an_engine_for_all_gpus_is_the_default(self) -> None:
        given = manifest()
        given["variants"][1]["requires"]["compatible"] = ["ampere-plus"]
        found = parse(write(config(given, "net", "tensorrt", given["variants"], DEFAULT)))
        assert found.default_model_filename == "b.engine"
        assert found.cc_model_filenames["8.9"] == "a.engine"

    def test_graphs_and_warm_up_prepare_the_batch_sizes_of_the_profile(self) -> None:
        found = message()
        assert [g.batch_size for g in found.optimization.cuda.graph_spec] == [1, 4, 16]
        assert list(found.optimization.cuda.graph_spec[1].input["x"].dim) == [3, 64]
        assert [(w.batch_size, list(w.inputs["x"].dims)) for w in found.model_warmup] == [(1, [3, 64]), (4, [3, 64]), (16, [3, 64])]
        assert not message(TritonOptions(cuda_graphs=False)).optimization.cuda.graphs

    def test_without_a_batch_dims_are_whole(self) -> None:
        found = message(batch=False)
        assert (found.max_batch_size, list(found.input[0].dims)) == (0, [-1, 3, -1])
        assert not found.HasField("dynamic_batching")
        assert list(found.model_warmup[0].inputs["x"].dims) == [4, 3, 64]

    def test_instances_lie_where_the_backend_runs(self) -> None:
        gpu, cpu = message(TritonOptions(instances=3)).instance_group[0], message(kind="onnx").instance_group[0]
        assert (gpu.count, gpu.kind, list(gpu.profile)) == (3, schema.ModelInstanceGroup.KIND_GPU, ["0"])
        assert (cpu.kind, message(kind="onnx").backend) == (schema.ModelInstanceGroup.KIND_CPU, "onnxruntime")


class TestRepository:
    def test_the_model_is_complete(self, bundled: Bundled, tmp_path: Path) -> None:
        (path,) = write_repository(bundled, tmp_path, TritonOptions())
        found = parse((path / "config.pbtxt").read_text())
        assert found.name == path.name == "net_onnx"
        assert (path / "1" / found.default_model_filename).read_bytes() == (bundled.directory / "model.onnx").read_bytes()
        assert {i.name for i in found.input} == {"x"}

    def test_engines_and_plugins_lie_where_the_configuration_says(self, bundled: Bundled, tmp_path: Path) -> None:
        given = manifest()
        given["variants"][0]["requires"] |= {"plugins": ["plugins/libp.so"], "compatible": ["version"]}
        folder = tmp_path / "b"
        for name in ("engines/a.engine", "engines/b.engine", "plugins/libp.so", "labels.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        (folder / "bundle.json").write_text((bundled.directory / "bundle.json").read_text())
        fake = Bundled(folder, given)
        (path,) = write_repository(fake, tmp_path / "repo", TritonOptions())
        assert (path / "1" / "b.engine").read_text() == "engines/b.engine"
        assert (path / "labels.txt").exists()
        plugins, version = fake.notes
        assert plugins == f"start Triton with --backend-config=tensorrt,plugins='{path}/plugins/libp.so'"
        assert "--backend-config=tensorrt,version-compatible=true" in version

    def test_a_model_written_before_is_replaced_and_others_are_not(self, bundled: Bundled, tmp_path: Path) -> None:
        write_repository(bundled, tmp_path, TritonOptions())
        (path,) = write_repository(bundled, tmp_path, TritonOptions(instances=2))
        assert parse((path / "config.pbtxt").read_text()).instance_group[0].count == 2
        (path / "bundle.json").unlink()
        with pytest.raises(UsageError, match="is not empty"):
            write_repository(bundled, tmp_path, TritonOptions())

    def test_a_bundle_without_anything_for_triton_is_refused(self, bundled: Bundled, tmp_path: Path) -> None:
        only = {**bundled.manifest, "variants": bundled.manifest["variants"][:1]}
        with pytest.raises(UsageError, match="nothing in this build runs in Triton"):
            write_repository(Bundled(bundled.directory, only), tmp_path, TritonOptions())


def test_text_is_escaped_as_protobuf_reads_it() -> None:
    name = 'a "b" \\ \n ü'
    assert parse(write({"name": name, "input": [{"name": "i", "data_type": Word("TYPE_BOOL")}]})).name == name
