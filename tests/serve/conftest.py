"""A trunk of three features and heads for it, made without torch in a millisecond."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from export.bundle import (
    CARD,
    GOLDEN,
    HEAD,
    HELDOUT,
    TRUNK_GRAPH,
    TRUNK_MANIFEST,
    Bundle,
    TrunkManifest,
    entry_of,
)
from models.pictures import Preprocessing
from serve import store as storing
from serve.engine import Engine
from serve.headlog import HeadLog
from serve.record import LogView, Record
from serve.trunks import store_trunk
from tests.serve.commands import connect, http, run
from tests.serve.faulty import FaultyServer
from tests.serve.oracle import Heads
from tests.serve.s3 import S3Server, new_url
from tests.serve.specialised import SpecialisedTrunk

__all__ = ["connect", "http", "run"]

SIZE_PX = 8
PREPROCESSING = Preprocessing(SIZE_PX, SIZE_PX, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
VERSIONS: dict[str, str] = {}
PROVENANCE = {
    "command": "test",
    "created_at": "2026-01-01T00:00:00Z",
    "seed": 0,
    "versions": VERSIONS,
}

BundleMaker = Callable[..., Bundle]


def trunk_graph(scale: float = 1 / 255) -> bytes:
    """The mean of each channel as the features: images uint8 [batch, 8, 8, 3] -> [batch, 3]."""
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "scale"], ["features"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        numpy_helper.from_array(np.array(scale, np.float32), "scale"),
    ]
    return _model(
        nodes,
        weights,
        helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIZE_PX, SIZE_PX, 3]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3]),
    )


def head_graph(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> bytes:
    """Logits = features x weight + bias, weight float32 [3, labels]."""
    return _model(
        [helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", len(weight)]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", len(bias)]),
    )


def _model(
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    given: onnx.ValueInfoProto,
    wanted: onnx.ValueInfoProto,
) -> bytes:
    graph = helper.make_graph(nodes, "graph", [given], [wanted], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


@pytest.fixture(scope="session")
def trunk_manifest() -> TrunkManifest:
    """`trunk.json` of the tiny trunk."""
    return TrunkManifest.model_validate(
        {
            "backbone": "channel_means",
            "cut": "none",
            "num_features": 3,
            "preprocessing": PREPROCESSING,
            "golden_tolerance": {"fp32": 1e-4},
            "provenance": PROVENANCE,
            "files": {TRUNK_GRAPH: entry_of(trunk_graph())},
        }
    )


@pytest.fixture(scope="session")
def engine(trunk_manifest: TrunkManifest) -> Engine:
    """The tiny trunk, loaded."""
    return Engine(trunk_graph(), trunk_manifest)


@pytest.fixture(scope="session")
def trunk_folder(tmp_path_factory: pytest.TempPathFactory, trunk_manifest: TrunkManifest) -> Path:
    """The tiny trunk as a folder."""
    folder = tmp_path_factory.mktemp("trunk")
    (folder / TRUNK_GRAPH).write_bytes(trunk_graph())
    (folder / TRUNK_MANIFEST).write_text(trunk_manifest.model_dump_json())
    return folder


@pytest.fixture(scope="session")
def make_bundle(trunk_manifest: TrunkManifest, engine: Engine) -> BundleMaker:
    """A function that makes a bundle; the same seed makes the same head."""

    def make(
        task: str = "colours",
        *,
        seed: int = 0,
        labels: tuple[str, ...] = ("red", "green", "blue"),
        trunk: str | None = None,
        graph: bytes | None = None,
        golden: bytes | None = None,
        weight: NDArray[np.float32] | None = None,
        heldout: bytes | None = None,
        thresholds: tuple[float, ...] | None = None,
    ) -> Bundle:
        chance = np.random.default_rng(seed)
        drawn = chance.normal(size=(3, len(labels))).astype(np.float32)
        weight = drawn if weight is None else weight
        head = graph or head_graph(weight, np.zeros(len(labels), np.float32))
        pictures = chance.integers(0, 256, (2, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
        logits = engine.features(pictures) @ weight
        return Bundle.pack(
            {
                HEAD: head,
                GOLDEN: golden or save({"pictures": pictures, "logits": logits}),
                CARD: f"# {task} {seed}\n".encode(),
                **({HELDOUT: heldout} if heldout else {}),
            },
            task=task,
            labels=labels,
            link="softmax" if thresholds is None else "sigmoid",
            thresholds=thresholds,
            trunk=trunk or trunk_manifest.digest,
            num_features=3,
            preprocessing=PREPROCESSING,
            data={"name": "none", "sha256": "0" * 64, "num_pictures": {}},
            metrics={},
            provenance=PROVENANCE,
        )

    return make


@pytest.fixture(scope="session")
def small_trunk(tmp_path_factory: pytest.TempPathFactory) -> SpecialisedTrunk:
    """A real network's trunk with adapter sites."""
    return SpecialisedTrunk(tmp_path_factory.mktemp("small32"))


@pytest.fixture
def heads(make_bundle: BundleMaker) -> Heads:
    """Bundles by seed, whose scores the oracle knows."""
    return Heads(make_bundle)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server that speaks S3."""
    with S3Server() as server:
        yield server


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on it, which this process may use."""
    for name, value in s3_server.variables().items():
        monkeypatch.setenv(name, value)
    return new_url()


@pytest.fixture
def faulty(
    s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyServer]:
    """What stands between this process and the S3 server, and lets all pass at first."""
    del s3_url
    with FaultyServer(s3_server.port) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits of a store that a test can wait for; those of a service are seconds."""
    monkeypatch.setattr(storing, "QUICK_S", 1.0)
    monkeypatch.setattr(storing, "SILENT_S", 1.0)
    monkeypatch.setattr(storing, "RETRIES_END_S", 0.4)


@pytest.fixture
def trunk_log(tmp_path: Path, trunk_manifest: TrunkManifest) -> HeadLog:
    """A log on a folder that has a trunk and nothing else."""
    log = HeadLog(str(tmp_path / "store"))
    files = {TRUNK_GRAPH: trunk_graph()}
    trunk = store_trunk(log, trunk_manifest.model_dump_json().encode(), files)
    log.put_record(
        Record(
            number=1,
            kind="commit",
            previous=LogView().tip,
            writer="test",
            written_at="",
            trunk=trunk,
        )
    )
    return log
