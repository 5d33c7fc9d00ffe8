"""The compiled C++ runner: its own unit tests, its commands, and its server asked by real HTTP clients."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploycc.output import digest_file
from deploycc.serve.bundle import BundleRequest, bundle

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = Path(__file__).parents[2] / "examples" / "serve_cpp" / "ask.py"


@pytest.fixture(scope="module")
def served(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle."""
    return bundle(BundleRequest(built, out=tmp_path_factory.mktemp("runner") / "net.bundle")).directory


def run(runner: Path, *words: object) -> subprocess.CompletedProcess[str]:
    command = [str(runner / "deploycc-serve"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@contextmanager
def serving(runner: Path, folder: Path) -> Iterator[str]:
    """Yield the URL of a running server, and check that it stops when told to."""
    command = [runner / "deploycc-serve", "serve", folder, "--port", "0", "--executor", "opencv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            line = next((each for each in process.stdout if each.startswith("serving")), "")
            yield line.split()[1].partition("/v2")[0]
        finally:
            process.terminate()
            assert process.wait(20) == 0


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})  # noqa: S310 - our own server
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_unit_tests_of_the_runner_pass(runner: Path) -> None:
    if not (runner / "serve-tests").exists():
        pytest.skip("doctest was not there when the runner was compiled")
    result = subprocess.run(["ctest", "--test-dir", runner, "--output-on-failure"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


class TestVerify:
    def test_a_sound_bundle_is_verified(self, runner: Path, served: Path) -> None:
        result = run(runner, "verify", served, "--executor", "opencv", "--workers", "2")
        assert result.returncode == 0, result.stderr
        assert "all hashes as recorded" in result.stdout

    @pytest.mark.parametrize("name", ["portable.onnx", "golden/input-0.npy", "engines/tensorrt-rtx-sm_89.engine"])
    def test_one_changed_byte_anywhere_is_found(self, runner: Path, served: Path, tmp_path: Path, name: str) -> None:
        copy = Path(shutil.copytree(served, tmp_path / "b"))
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        result = run(runner, "verify", copy, "--executor", "opencv")
        assert (result.returncode, "its SHA-256 differs" in result.stderr, name in result.stderr) == (3, True, True)

    def test_wrong_outputs_are_not_served(self, runner: Path, served: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(served, tmp_path / "b"))
        manifest = json.loads((copy / "bundle.json").read_text())
        path = manifest["variants"][2]["golden"][0]["path"]
        np.save(copy / path, np.load(copy / path) * np.float32(1.001))
        manifest["files"][path]["sha256"] = digest_file(copy / path)
        (copy / "bundle.json").write_text(json.dumps(manifest))
        result = run(runner, "serve", copy, "--executor", "opencv", "--port", "0")
        assert result.returncode == 3
        assert "is at 60.0 dB from its golden output" in result.stderr
        assert "serving" not in result.stdout

    def test_a_bundle_that_points_outside_is_refused(self, runner: Path, served: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(served, tmp_path / "b"))
        text = (copy / "bundle.json").read_text()
        (copy / "bundle.json").write_text(text.replace("portable.onnx", "../portable.onnx"))
        result = run(runner, "verify", copy)
        assert result.returncode == 3
        assert "inside the bundle" in result.stderr

    def test_bad_commands_say_what_to_do(self, runner: Path, served: Path, tmp_path: Path) -> None:
        for words, text in (
            (["verify", tmp_path / "no"], "cannot be opened"),
            (["verify"], "no bundle is named"),
            (["sing", served], "the command 'sing' is not known"),
            (["verify", served, "--workers", "0"], "no number from 1 to 64"),
            (["verify", served, "--nope", "0"], "the option '--nope' is not known"),
        ):
            result = run(runner, *words)
            assert (result.returncode, text in result.stderr) == (2, True), result.stderr


class TestRun:
    def test_given_inputs_are_inferred(self, runner: Path, served: Path, tmp_path: Path) -> None:
        x = np.load(served / "golden" / "input-0.npy")
        np.save(tmp_path / "x.npy", x[1:3])
        result = run(runner, "run", served, "--executor", "opencv", "--input", f"x={tmp_path / 'x.npy'}", "--out", tmp_path)
        assert result.returncode == 0, result.stderr
        golden = np.load(served / "golden" / "portable-output-0.npy")[1:3]
        np.testing.assert_allclose(np.load(tmp_path / "output-0.npy"), golden, rtol=1e-4, atol=1e-5)
        assert f"class {golden[1].argmax()}" in result.stdout

    def test_a_shape_beyond_the_profile_is_refused(self, runner: Path, served: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((5, 16, 6, 6), np.float32))
        result = run(runner, "run", served, "--executor", "opencv", "--input", f"x={tmp_path / 'x.npy'}")
        assert (result.returncode, "send shapes from [1, 16, 6, 6] to [4, 16, 6, 6]" in result.stderr) == (2, True)

    def test_bench_measures(self, runner: Path, served: Path) -> None:
        result = run(runner, "bench", served, "--executor", "opencv", "--seconds", "1", "--batch", "3", "--clients", "2")
        assert result.returncode == 0, result.stderr
        assert "requests of [3, 16, 6, 6], 2 clients" in result.stdout


class TestServer:
    def test_a_client_of_the_standard_library_is_served_the_golden_outputs(self, runner: Path, served: Path) -> None:
        with serving(runner, served) as url:
            result = subprocess.run([sys.executable, ASK, served, url], capture_output=True, text=True, timeout=60)
        assert (result.returncode, "served and verified" in result.stdout) == (0, True), result.stderr

    def test_tritons_own_client_is_served(self, runner: Path, served: Path) -> None:
        triton = pytest.importorskip("tritonclient.http", reason="pip install --no-deps -r tests/serve/requirements.txt")
        x = np.load(served / "golden" / "input-0.npy")
        with serving(runner, served) as url, triton.InferenceServerClient(url.removeprefix("http://")) as client:
            assert client.is_server_live()
            assert client.is_model_ready("net")
            assert client.get_model_metadata("net")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16, 6, 6]}]
            given = triton.InferInput("x", x.shape, "FP32")
            given.set_data_from_numpy(x)
            for is_raw in (True, False):
                answer = client.infer("net", [given], outputs=[triton.InferRequestedOutput("y", binary_data=is_raw)])
                np.testing.assert_allclose(answer.as_numpy("y"), np.load(served / "golden" / "portable-output-0.npy"), rtol=1e-4, atol=1e-5)

    def test_bad_requests_are_refused_and_the_server_lives(self, runner: Path, served: Path) -> None:
        with serving(runner, served) as url:
            infer = f"{url}/v2/models/net/infer"
            for body, status in ((b"{", 400), (b"[" * 5000, 400), (b"{}", 400), (b"x" * 3_000_000, 413)):
                assert post(infer, body)[0] == status
            assert post(infer, b"{}", **{"Content-Encoding": "gzip"})[0] == 415
            assert post(f"{url}/v2/models/other/infer", b"{}")[0] == 404
            data = np.load(served / "golden" / "input-0.npy")[:1]
            body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": data.shape, "data": data.ravel().tolist()}]}
            status, answer = post(infer, json.dumps(body).encode())
            assert (status, answer["outputs"][0]["shape"]) == (200, [1, 5])

    def test_requests_of_many_clients_each_get_their_own_rows(self, runner: Path, served: Path) -> None:
        from concurrent.futures import ThreadPoolExecutor

        x = np.load(served / "golden" / "input-0.npy")
        wanted = np.load(served / "golden" / "portable-output-0.npy")
        with serving(runner, served) as url, ThreadPoolExecutor(8) as pool:

            def ask(row: int) -> np.ndarray:
                body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 16, 6, 6], "data": x[row].ravel().tolist()}]}
                return np.array(post(f"{url}/v2/models/net/infer", json.dumps(body).encode())[1]["outputs"][0]["data"], np.float32)

            found = list(pool.map(ask, [i % 4 for i in range(32)]))
        for i, row in enumerate(found):
            np.testing.assert_allclose(row, wanted[i % 4], rtol=1e-4, atol=1e-5)
