"""A store with a trunk and thousands of linear heads with random weights, as a program.

A process of its own, because making a trunk needs torch and what serves it does not: whoever
measures resident memory calls `benchmarks.bank.make_bank`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.fixtures import make_trunk
from benchmarks.report import note
from export.bundle import CARD, GOLDEN, HEAD, Bundle, TrunkManifest, read_trunk_folder
from serve.headlog import HeadLog
from serve.record import LogView, Record, TaskChange
from serve.trunks import store_trunk

MIN_LABELS, MAX_LABELS = 2, 100
REST = {GOLDEN: b"not read by serving", CARD: b"not read by serving"}


def main() -> None:
    """Folder and number of tasks are the arguments."""
    folder, num_tasks = Path(sys.argv[1]), int(sys.argv[2])
    trunk = make_trunk(folder / "trunk")
    log = HeadLog(str(folder / "store"))
    manifest_bytes = (folder / "trunk" / "trunk.json").read_bytes()
    change = store_trunk(log, manifest_bytes, read_trunk_folder(folder / "trunk")[1])
    for data in REST.values():
        log.put_blob(data)
    chance = np.random.default_rng(0)
    # Log-uniform: as many tasks have 2 to 14 labels as have 14 to 100.
    exponents = chance.uniform(np.log(MIN_LABELS), np.log(MAX_LABELS + 1), num_tasks)
    changes = []
    for place, num_labels in enumerate(np.exp(exponents).astype(int).tolist()):
        weight = chance.normal(size=(num_labels, trunk.num_features)).astype(np.float32)
        changes.append(_push(log, trunk, f"task{place}", weight))
        if place % 1000 == 999:
            note(f"{place + 1} of {num_tasks} heads written")
    log.put_record(
        Record(
            number=1, kind="commit", previous=LogView().tip, writer="benchmark",
            written_at="2026-01-01T00:00:00Z", changes=tuple(changes), trunk=change,
        )
    )  # fmt: skip


def _push(log: HeadLog, trunk: TrunkManifest, task: str, weight: NDArray[np.float32]) -> TaskChange:
    labels = tuple(f"label{number}" for number in range(len(weight)))
    graph = _graph(weight)
    bundle = Bundle.pack(
        {HEAD: graph, **REST}, task=task, labels=labels, trunk=trunk.digest,
        num_features=trunk.num_features, preprocessing=trunk.preprocessing,
        data={"name": "none", "sha256": "0" * 64, "num_pictures": {}}, metrics={},
        provenance=trunk.provenance,
    )  # fmt: skip
    log.put_blob(graph)
    digest = log.put_blob(bundle.manifest_bytes)
    return TaskChange(task=task, version=1, action="push", bundle=digest, labels=labels)


def _graph(weight: NDArray[np.float32]) -> bytes:
    num_labels, num_features = weight.shape
    bias = np.linspace(-1, 1, num_labels, dtype=np.float32)
    given, wanted = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("features", num_features), ("logits", num_labels))
    )
    gemm = helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"], transB=1)
    weights = [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")]
    graph = helper.make_graph([gemm], "head", [given], [wanted], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


if __name__ == "__main__":
    main()
