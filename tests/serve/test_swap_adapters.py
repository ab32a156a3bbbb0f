"""Adapters and tails are pushed, swapped, paged and refused like heads, while requests run."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from PIL import Image
from safetensors.numpy import load, save

from export.bundle import ADAPTER, MANIFEST, TAIL, Bundle
from serve import gates
from serve.jobs import DeadlineError, Job
from serve.messages import Refused
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.specialised import Specialised, SpecialisedTrunk, some_pictures

PICTURES = some_pictures(3, seed=3)


def slots(trunk: SpecialisedTrunk, number: int) -> int:
    """Bytes of so many scale-and-shift adapters."""
    shapes = trunk.engine().families["scale_shift"].slot_shapes(0).values()
    return number * sum(4 * int(np.prod(shape)) for shape in shapes)


class Callers:
    """Threads that ask random tasks of random replicas, and keep what they were told."""

    def __init__(self, fleet: LocalFleet, tasks: tuple[str, ...], *, number: int = 4) -> None:
        self._fleet, self._tasks = fleet, tasks
        self._stop = threading.Event()
        self.seen: list[tuple[str, int, int, NDArray[np.float32]]] = []
        self.failures: list[Exception] = []
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(number)]

    def __enter__(self) -> Callers:  # noqa: PYI034 (nobody inherits)
        """Start calling."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and wait for the last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, number: int) -> None:
        chance = np.random.default_rng(number)
        while not self._stop.is_set():
            picture, task = int(chance.integers(len(PICTURES))), str(chance.choice(self._tasks))
            name = str(chance.choice(self._fleet.routed()))
            job = Job([PICTURES[picture]], (task,))
            try:
                ((answer,),) = self._fleet.replicas[name].batcher.submit(job).result(10)
            # Whatever it is, it was not to happen.
            except Exception as error:  # noqa: BLE001
                self.failures.append(error)
                return
            self.seen.append((task, picture, answer.live.version, answer.scores))


def test_swaps_of_every_size_under_load_with_memory_for_a_few(
    tmp_path: Path, small_trunk: SpecialisedTrunk
) -> None:
    """Five tasks with adapters, memory for two: all answers are those of the version they name."""
    made: dict[tuple[str, int], Specialised] = {}
    with LocalFleet(
        tmp_path,
        small_trunk.folder,
        replicas=2,
        adapter_memory_bytes=slots(small_trunk, 2),
    ) as fleet:

        def push(task: str, specialised: Specialised) -> None:
            made[task, fleet.must_push(specialised.bundle)] = specialised

        names = ("a", "b", "c", "d", "e")
        for seed, task in enumerate(names):
            push(task, small_trunk.with_adapter(task, "ssf", seed))
        push("head", small_trunk.with_head("head", 20))
        push("tail", small_trunk.with_tail("tail", 21))
        with Callers(fleet, (*names, "head", "tail")) as callers:
            push("a", small_trunk.with_adapter("a", "bias", 30))
            push("b", small_trunk.with_tail("b", 31))  # a task may change its size
            push("head", small_trunk.with_adapter("head", "ssf", 32))
            push("tail", small_trunk.with_head("tail", 33))
            push("c", small_trunk.with_adapter("c", "ssf", 34))
            fleet.wait_admitted(fleet.start_replica())
            push("a", small_trunk.with_adapter("a", "ssf", 35))
            until(lambda: any((task, v) == ("a", 3) for task, _, v, _ in list(callers.seen)))

    assert callers.failures == []
    truths = {key: specialised.truth(PICTURES) for key, specialised in made.items()}
    for task, picture, version, scores in callers.seen:
        np.testing.assert_allclose(scores, truths[task, version][picture], atol=1e-5)
    assert len(callers.seen) > 100


def test_a_task_that_cannot_be_brought_in_fails_at_its_deadline_with_503(
    tmp_path: Path, small_trunk: SpecialisedTrunk
) -> None:
    """Memory is full of a pinned task; others go on, and unpinning lets it in."""
    memory = slots(small_trunk, 1)
    with LocalFleet(tmp_path, small_trunk.folder, replicas=1, adapter_memory_bytes=memory) as fleet:
        for seed, task in enumerate(("kept", "left")):
            fleet.must_push(small_trunk.with_adapter(task, "ssf", seed).bundle)
        fleet.set_task("kept", pinned=True)
        http = HttpClient(fleet, "replica-1")
        body, soon = _png(), {"x-headstock-timeout-ms": "300"}
        answers = [
            http.post("/predict/kept", content=body),
            http.post("/predict/left", content=body, headers=soon),
            http.post("/predict/kept", content=body),
            http.post("/predict?tasks=kept,left", content=body),
        ]
        fleet.set_task("kept", key="again", pinned=False)
        answers.append(http.post("/predict/left", content=body))

    assert [answer.status_code for answer in answers] == [200, 503, 200, 413, 200]
    assert "retry-after" in answers[1].headers
    assert "adapter_memory_bytes" in answers[3].json()["detail"]


def test_a_late_adapter_is_a_deadline_error(tmp_path: Path, small_trunk: SpecialisedTrunk) -> None:
    """As the batcher gives it to callers in Python."""
    with LocalFleet(
        tmp_path, small_trunk.folder, replicas=1, adapter_memory_bytes=slots(small_trunk, 1)
    ) as fleet:
        for seed, task in enumerate(("kept", "left")):
            fleet.must_push(small_trunk.with_adapter(task, "ssf", seed).bundle)
        fleet.set_task("kept", pinned=True)
        batcher = fleet.replicas["replica-1"].batcher
        batcher.submit(Job([PICTURES[0]], ("kept",))).result(10)
        job = Job([PICTURES[0]], ("left",))
        job.deadline_s = job.queued_at + 0.2
        with pytest.raises(DeadlineError):
            batcher.submit(job).result(10)


def test_a_push_without_memory_for_its_adapter_is_refused(
    tmp_path: Path, small_trunk: SpecialisedTrunk
) -> None:
    """With the setting that would have to be larger; the task stays as it was."""
    with LocalFleet(tmp_path, small_trunk.folder, replicas=1, adapter_memory_bytes=100) as fleet:
        fleet.must_push(small_trunk.with_head("a", 1).bundle)
        outcome = fleet.push(small_trunk.with_adapter("a", "ssf", 2).bundle)

        assert fleet.live_versions("a") == {1}
    assert isinstance(outcome, Refused)
    assert "adapter_memory_bytes" in outcome.reason


def _nan(weights: dict[str, NDArray[np.float32]]) -> None:
    next(iter(weights.values())).flat[0] = np.nan


def _other_shape(weights: dict[str, NDArray[np.float32]]) -> None:
    name = next(iter(weights))
    weights[name] = np.concatenate([weights[name], weights[name]])


def _site_missing(weights: dict[str, NDArray[np.float32]]) -> None:
    weights.pop(next(iter(weights)))


def _site_unknown(weights: dict[str, NDArray[np.float32]]) -> None:
    weights["stage9/scale"] = np.ones(3, np.float32)


def _other_values(weights: dict[str, NDArray[np.float32]]) -> None:
    weights.update({name: values + 0.5 for name, values in weights.items()})


@pytest.mark.parametrize(
    ("change", "gate", "reason"),
    [
        (_nan, "adapter", "not finite"),
        (_other_shape, "adapter", "has shape"),
        (_site_missing, "adapter", "has shape None"),
        (_site_unknown, "adapter", "takes None"),
        (_other_values, "golden", "do not reproduce"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    small_trunk: SpecialisedTrunk,
    change: Callable[[dict[str, NDArray[np.float32]]], None],
    gate: str,
    reason: str,
) -> None:
    """With the gate that says so, and why."""
    bundle = small_trunk.with_adapter("a", "ssf", 1).bundle
    weights = {name: values.copy() for name, values in load(bundle.files[ADAPTER]).items()}
    change(weights)
    changed = _packed(bundle, {ADAPTER: save(weights)})
    verdict = gates.admit(changed, small_trunk.engine(), max_head_bytes=2**24)[-1]

    assert (verdict.gate, verdict.passed) == (gate, False)
    assert reason in verdict.reason


def test_a_hostile_tail_is_refused_before_it_is_loaded(small_trunk: SpecialisedTrunk) -> None:
    """A loop in it, or a convolution that costs minutes."""
    bundle = small_trunk.with_tail("a", 1).bundle
    looping, costly = (onnx.load_model_from_string(bundle.files[TAIL]) for _ in range(2))
    body = helper.make_graph([], "body", [], [])
    looping.graph.node.append(helper.make_node("Loop", ["", ""], ["out"], body=body))
    (given,) = (value for value in costly.graph.input if value.name == "prefix")
    for dimension in given.type.tensor_type.shape.dim[2:]:
        dimension.dim_value = 4096
    engine = small_trunk.engine()
    for model, reason in ((looping, "the operator Loop"), (costly, "expected one float32")):
        changed = _packed(bundle, {TAIL: model.SerializeToString()})
        verdict = gates.admit(changed, engine, max_head_bytes=2**24)[-1]
        assert (verdict.gate, verdict.passed) == ("graph", False)
        assert reason in verdict.reason


def test_a_push_of_an_adapter_for_another_trunk_is_refused_by_the_fleet(
    tmp_path: Path, trunk_folder: Path, small_trunk: SpecialisedTrunk
) -> None:
    """The tiny trunk has no adapted graph at all."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        outcome = fleet.push(small_trunk.with_adapter("a", "ssf", 1).bundle)

    assert isinstance(outcome, Refused)
    assert "trained on trunk" in outcome.reason


def _packed(bundle: Bundle, files: Mapping[str, bytes]) -> Bundle:
    """The same manifest over other files."""
    fields = bundle.manifest.model_dump(exclude={"files"})
    others = {name: data for name, data in bundle.files.items() if name != MANIFEST}
    return Bundle.pack({**others, **files}, **fields)


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURES[0]).save(buffer, "PNG")
    return buffer.getvalue()
