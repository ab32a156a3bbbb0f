"""The device that is asked for, what is found on this machine, and what is said about it."""

from __future__ import annotations

import logging
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.bundle import TRUNK_ADAPTED, TRUNK_GRAPH
from serve import contender, devices, gates, onnx_session
from serve.adapted import families_in
from serve.devices import choose_device, gpu_share, limit_gpu_memory, refuse_without_gpu
from serve.engine import Engine, LiveHead, Row
from serve.heads import Head
from serve.onnx_session import CUDA, DeviceError, open_session
from serve.paging import AdapterMemory
from serve.service import Service
from serve.settings import ServeSettings
from tests.serve.conftest import trunk_graph
from tests.serve.graphs import two_row_head
from tests.serve.oracle import some_picture
from tests.serve.specialised import SpecialisedTrunk, some_pictures

HAS_GPU = devices._num_gpus() > 0
no_gpu = pytest.mark.skipif(HAS_GPU, reason="this machine has a GPU")
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="NVIDIA's driver shows no GPU here")
gpu_build = pytest.mark.skipif(
    CUDA not in devices.onnxruntime.get_available_providers(),
    reason="there is no ONNX Runtime with CUDA for this system",
)

ROOT = Path(__file__).resolve().parents[2]
SHARES = """
from serve import app
from serve.devices import choose_device
from serve.settings import ServeSettings

app.wait_for_trunk = lambda store: None
cases = (
    ("auto", {"GPU": 1.0}, 0),
    ("cuda", {"GPU": 3.0}, 0),
    ("cpu", {"GPU": 1.0}, 0),
    ("auto", {}, 0),
    ("cuda", {}, 0.25),
    ("cpu", {}, 0.25),
)
for device, gpus, share in cases:
    app.ray.cluster_resources = lambda: {"CPU": 2.0, **gpus}
    settings = ServeSettings(store="/s", device=device, replicas=3, gpus_per_replica=share)
    application = app.build_app(settings)
    print(application._bound_deployment.ray_actor_options["num_gpus"])
app._log_to_stderr()
choose_device("cpu")
"""


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What went to the log of the devices."""
    return [record.message for record in caplog.records if record.name == "serve.devices"]


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "serve.devices")


def test_cpu_asks_no_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also where there is one."""
    monkeypatch.setattr(devices, "_missing", lambda: pytest.fail("looked for a GPU"))

    assert choose_device("cpu") == "cpu"
    assert said(caplog) == ["device cpu, as set"]


@no_gpu
@gpu_build
def test_auto_without_a_gpu_is_the_cpu_and_prints_nothing(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime lists CUDA all the same, and would print an error in red if it was asked."""
    assert choose_device("auto") == "cpu"
    assert said(caplog) == ["device cpu: NVIDIA's driver shows no GPU"]
    assert capfd.readouterr() == ("", "")


@no_gpu
@gpu_build
def test_auto_with_a_gpu_but_without_its_libraries_is_the_cpu_and_says_which(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A driver alone is not enough: a session is tried, and its own first error is the reason."""
    monkeypatch.setattr(devices, "_num_gpus", lambda: 1)
    # What it says of each library that is not installed.
    monkeypatch.setattr(
        devices.onnxruntime, "preload_dlls", lambda: sys.stdout.write("Failed to load")
    )

    assert choose_device("auto") == "cpu"
    (line,) = said(caplog)
    assert line.startswith("device cpu: Failed to load library ")
    assert "cannot open shared object file" in line
    assert capfd.readouterr() == ("", "")


@no_gpu
@gpu_build
@pytest.mark.parametrize(
    ("num_gpus", "problem"),
    [(0, "NVIDIA's driver shows no GPU"), (1, "cannot open shared object file")],
)
def test_cuda_that_cannot_be_used_is_an_error_that_says_why_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, problem: str
) -> None:
    """What was found, and both ways out."""
    monkeypatch.setattr(devices, "_num_gpus", lambda: num_gpus)

    with pytest.raises(DeviceError) as error:
        choose_device("cuda")
    message = str(error.value)
    assert message.startswith("Setting device is cuda, but it cannot be used: ")
    assert problem in message
    assert "ONNX Runtime lists TensorrtExecutionProvider, CUDAExecutionProvider, CPU" in message
    assert "Install headstock[gpu] and NVIDIA's driver, or serve with --device cpu." in message


def test_a_build_without_cuda_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on systems for which there is no other."""
    cpu_only = ["CPUExecutionProvider"]
    monkeypatch.setattr(devices.onnxruntime, "get_available_providers", lambda: cpu_only)

    assert choose_device("auto") == "cpu"
    assert said(caplog) == ["device cpu: ONNX Runtime is built without CUDAExecutionProvider"]


@no_gpu
@gpu_build
def test_a_session_that_silently_got_the_cpu_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime itself only prints that it did not do what it was asked."""
    with pytest.raises(DeviceError, match="asked for CUDAExecutionProvider got CPUExecution"):
        open_session(trunk_graph(), "cuda")
    assert "Failed to load library" in capfd.readouterr().err


@no_gpu
@gpu_build
def test_trunk_prefix_adapted_graph_and_tail_run_on_the_device_and_heads_do_not(
    small_trunk: SpecialisedTrunk, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by who fails where there is no GPU."""
    with pytest.raises(DeviceError):
        Engine(trunk_graph(), engine.manifest, device="cuda")
    on_cpu = small_trunk.engine()
    monkeypatch.setattr(on_cpu, "device", "cuda")
    with pytest.raises(DeviceError):
        on_cpu.prefix(some_pictures(1, seed=0))
    for graph in families_in(small_trunk.files[TRUNK_ADAPTED], "cuda").values():
        with pytest.raises(DeviceError):
            _ = graph.session
    with pytest.raises(DeviceError):
        Head.of_bundle(small_trunk.with_tail("tail", 1).bundle, "cuda")
    manifest = small_trunk.with_head("head", 2).bundle.manifest
    Head.of_graph(two_row_head(), manifest, "cuda")


def test_a_session_never_goes_on_with_another_device() -> None:
    """ONNX Runtime's own way is to print that a GPU failed, and to run on the CPU from then on."""
    assert not open_session(trunk_graph())._enable_fallback


@no_gpu
def test_the_service_refuses_before_ray_starts(tmp_path: Path, trunk_folder: Path) -> None:
    """The reason is the command's one line, not an error out of a replica."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServeSettings(store=str(tmp_path / "store"), port=port, device="cuda")
    steps: list[str] = []
    service = Service(settings, trunk=trunk_folder, proxy="python", progress=steps.append)

    with pytest.raises(DeviceError), service:
        pass
    assert steps == ["store"]


@no_gpu
def test_only_cuda_is_refused() -> None:
    """The others always find something."""
    refuse_without_gpu("auto")
    refuse_without_gpu("cpu")


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 8, 50])
@pytest.mark.parametrize("num_gpus", [1, 2, 3, 8])
def test_all_replicas_fit_on_the_gpus_and_share_them_evenly(replicas: int, num_gpus: int) -> None:
    """Ray puts a replica on one GPU only; no GPU has two more than another must."""
    share = gpu_share("auto", replicas=replicas, num_gpus=num_gpus)
    fit_on_one = math.floor(1 / share + 1e-9)

    assert 0 < share <= 1
    assert fit_on_one * num_gpus >= replicas
    assert (fit_on_one - 1) * num_gpus < replicas
    # Ray's own resolution.
    assert round(share, 4) == share


@pytest.mark.parametrize(("wanted", "num_gpus"), [("cpu", 4), ("auto", 0)])
def test_replicas_on_the_cpu_take_no_gpu(wanted: str, num_gpus: int) -> None:
    """A GPU that is there is left to others."""
    settings = ServeSettings.model_validate({"store": "/s", "device": wanted})

    assert gpu_share(settings.device, replicas=2, num_gpus=num_gpus) == 0


def test_replicas_ask_ray_for_their_share() -> None:
    """Ray takes the options, and shows a replica no GPU but its own; what it picks is logged.

    A share that is set is asked for also where no node has a GPU yet.
    """
    # In a process of its own: importing Ray warns, and warnings are errors here.
    ran = subprocess.run(
        [sys.executable, "-c", SHARES], check=True, capture_output=True, text=True, cwd=ROOT
    )

    assert ran.stdout.split() == ["0.3333", "1.0", "0.0", "0.0", "0.25", "0.0"]
    assert ran.stderr.endswith(" INFO serve.devices: device cpu, as set\n")


def test_cuda_in_a_cluster_without_a_gpu_is_an_error() -> None:
    """Ray would wait for a node that never comes."""
    with pytest.raises(DeviceError, match="Ray sees no GPU on any node"):
        gpu_share("cuda", replicas=2, num_gpus=0)


@pytest.mark.parametrize(
    ("share", "limits"), [(0.25, ["2000000000"] * 2), (1.0, [None] * 2), (0.0, [None] * 2)]
)
def test_a_part_of_a_gpu_limits_what_each_session_takes(
    monkeypatch: pytest.MonkeyPatch, share: float, limits: list[str | None]
) -> None:
    """Of 24 GB a quarter is 6; either graph of the trunk may take a third of that."""
    asked: list[str | None] = []

    def take(*_: object, providers: list[tuple[str, dict[str, str]]], **__: object) -> None:
        asked.append(providers[0][1].get("gpu_mem_limit"))
        raise DeviceError("no session is made here")

    monkeypatch.setattr(devices, "_gpu_memory_bytes", lambda: 24 * 10**9)
    monkeypatch.setattr(onnx_session.onnxruntime, "InferenceSession", take)
    monkeypatch.setattr(onnx_session, "_CUDA_OPTIONS", dict(onnx_session._CUDA_OPTIONS))
    providers = {"cuda": [(CUDA, onnx_session._CUDA_OPTIONS)]}
    monkeypatch.setattr(onnx_session, "_PROVIDERS", providers)
    limit_gpu_memory(share)
    for _ in range(2):
        with pytest.raises(DeviceError):
            open_session(trunk_graph(), "cuda")

    assert asked == limits


@gpu
@needs_gpu
def test_a_gpu_is_picked_and_answers_as_the_cpu_does(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Within the tolerance that golden samples have."""
    pictures = np.stack([some_picture(seed) for seed in range(5)])
    device = choose_device("auto")
    on_gpu = Engine(trunk_graph(), engine.manifest, device=device)

    assert said(caplog) == ["device cuda: a session asked for CUDAExecutionProvider and got it"]
    np.testing.assert_allclose(
        on_gpu.features(pictures),
        engine.features(pictures),
        atol=engine.manifest.golden_tolerance["fp32"],
    )


@gpu
@needs_gpu
def test_every_size_of_specialisation_is_answered_on_a_gpu_as_on_the_cpu(
    small_trunk: SpecialisedTrunk,
) -> None:
    """Heads, adapters of both families and tails, within the tolerance that golden samples have."""
    assert choose_device("cuda") == "cuda"
    tasks = [
        small_trunk.with_head("head", 1),
        small_trunk.with_adapter("lora", "lora", 2, width=3),
        small_trunk.with_adapter("ssf", "ssf", 3),
        small_trunk.with_tail("tail", 4),
    ]
    pictures = some_pictures(3, seed=5)
    on_gpu = Engine(
        small_trunk.files[TRUNK_GRAPH],
        small_trunk.manifest,
        adapted=small_trunk.files[TRUNK_ADAPTED],
        device="cuda",
    )
    memory = AdapterMemory(on_gpu.families, budget_bytes=2**24)
    heads = []
    for task in tasks:
        manifest = task.bundle.manifest
        assert all(
            verdict.passed for verdict in gates.admit(task.bundle, on_gpu, max_head_bytes=2**24)
        )
        adapter = None
        if manifest.adapter:
            weights = contender.read_adapter(task.bundle)
            adapter = memory.add(manifest.task, manifest.adapter, weights)
        head = contender.load_head(task.bundle, "cuda")
        heads.append(LiveHead(manifest.task, 1, task.bundle.digest, head, adapter=adapter))
    assert memory.pin(heads)
    rows = [Row(place, head) for place in range(3) for head in heads]
    answers = on_gpu.run(pictures, rows)
    memory.close()

    truths = [task.truth(pictures) for task in tasks]
    tolerance = small_trunk.manifest.golden_tolerance["fp32"]
    for row, got in zip(rows, answers, strict=True):
        assert isinstance(got, np.ndarray), got
        truth = truths[heads.index(row.head)][row.image_of]
        np.testing.assert_allclose(got, truth, atol=tolerance)
