"""INT8 from a trained student to served answers: searched, judged, written, loaded, asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load
from safetensors.torch import save_file

from export.bundle import (
    GOLDEN,
    HEAD,
    TRUNK_GRAPH,
    TRUNK_INT8,
    TRUNK_MANIFEST,
    Bundle,
    Precision,
    TrunkManifest,
    read_trunk_folder,
)
from export.precision import Candidate
from export.recipe import MadeHead, make_head, make_trunk
from export.trial import Trial, make_trial
from export.trunk import TrunkReport
from models.backbones import build_backbone
from models.checkpoint import save_student
from models.data import to_batch
from models.digits import DIGIT_TASKS, load_digit_task
from models.fine_tuning import fine_tuning
from models.recipe import SAMPLES
from models.record import TaskRecord
from models.transfer import teach
from serve import gates
from serve.engine import Engine, Row
from serve.headlog import HeadLog
from serve.heads import HeadOutputError
from serve.loading import HeadLoader
from serve.onnx_session import open_session
from serve.record import TaskChange
from serve.trunks import load_engine, store_trunk

STRATEGIES = ("head", "lora", "tail")
BATCH = 32

Pixels = UInt8[np.ndarray, "pictures height width 3"]


@dataclass(frozen=True)
class World:
    """A trunk with an INT8 variant as its export left it, and what serving loads of it."""

    report: TrunkReport
    files: dict[str, bytes]
    engines: dict[Precision, Engine]
    trial: Trial
    made: dict[str, MadeHead]

    @property
    def manifest(self) -> TrunkManifest:
        """The trunk's."""
        return self.report.manifest

    @property
    def written(self) -> Candidate:
        """The candidate whose graph is in the folder."""
        (found,) = [c for c in self.report.candidates if c.graph == self.files[TRUNK_INT8]]
        return found

    @property
    def pictures(self) -> Pixels:
        """Test pictures of one of the tasks; the others have the same ones."""
        return self.trial.tests[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A net of eleven convolutions, three epochs of digits, and everything after that for real."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("int8")
    data = load_digit_task("digits", seed=0)
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    teach(backbone, data, fine_tuning("scratch", num_epochs=3), augmentation=None, seed=0)
    record = TaskRecord(labels=data.labels, teacher="none", data=data.record())
    save_student(folder / "student", backbone, tasks=(record,), metrics={}, seed=0, command="test")
    samples = to_batch(data.train.pictures[:16], backbone.preprocessing)
    save_file({"pictures": samples}, folder / "student" / SAMPLES)
    report = make_trunk(
        folder / "student", folder / "trunk", precision="int8", sources=DIGIT_TASKS, command="test"
    )
    _, files = read_trunk_folder(folder / "trunk")
    log = HeadLog(str(folder / "store"))
    change = store_trunk(log, (folder / "trunk" / TRUNK_MANIFEST).read_bytes(), files)
    tasks = [load_digit_task(task, seed=0) for task in DIGIT_TASKS]
    return World(
        report,
        files,
        {p: load_engine(log, change, precision=p) for p in ("fp32", "int8")},
        make_trial(files[TRUNK_GRAPH], tasks, backbone.preprocessing),
        {s: made_by(s, folder / "trunk") for s in STRATEGIES},
    )


def made_by(strategy: str, trunk: Path) -> MadeHead:
    """A few hundred digits learned on the float trunk."""
    return make_head(
        "loop", trunk, task=strategy, strategy=strategy,  # pyrefly: ignore
        width=2, seed=0, command="test", max_train=200,
    )  # fmt: skip


def features(engine: Engine, pictures: Pixels) -> NDArray[np.float32]:
    """In batches of another size than the export's."""
    starts = range(0, len(pictures), BATCH)
    return np.concatenate([engine.features(pictures[start : start + BATCH]) for start in starts])


def logits(scores: list[NDArray[np.float32] | HeadOutputError]) -> NDArray[np.float32]:
    """Of scores after a softmax, up to a constant that leaves their mean at zero."""
    values = np.log(np.stack([row for row in scores if not isinstance(row, HeadOutputError)]))
    return values - values.mean(axis=1, keepdims=True)


def verdict(bundle: Bundle, engine: Engine) -> tuple[str, bool]:
    """The last gate that was asked, and what it said."""
    last = gates.admit(bundle, engine, max_head_bytes=2**24)[-1]
    return last.gate, last.passed


def test_the_variant_is_accepted_smaller_and_of_the_same_trunk(world: World) -> None:
    """Ten real heads accept it; its tolerance is twice what moved their logits most."""
    found = world.written.agreement

    assert found is not None
    assert found.is_accepted
    assert found.num_heads == 10
    assert world.manifest.precisions == ("fp32", "int8")
    assert world.manifest.golden_tolerance["int8"] == pytest.approx(2 * found.largest_shift)
    assert len(world.files[TRUNK_INT8]) < 0.6 * len(world.files[TRUNK_GRAPH])


def test_served_answers_agree_with_float_as_the_report_says(world: World) -> None:
    """All heads on all test pictures, by matrix products of numpy, counted anew."""
    same = right_before = right_after = total = 0
    shift = 0.0
    before, after = (
        [features(world.engines[p], pictures) for pictures in world.trial.tests]
        for p in ("fp32", "int8")
    )
    for trial in world.trial.heads:
        weight, bias = (t.detach().numpy() for t in (trial.head.weight, trial.head.bias))
        old = before[trial.task] @ weight.T + bias
        new = after[trial.task] @ weight.T + bias
        labels = trial.labels.numpy()
        same += int((old.argmax(1) == new.argmax(1)).sum())
        right_before += int((old.argmax(1) == labels).sum())
        right_after += int((new.argmax(1) == labels).sum())
        total += len(labels)
        shift = max(shift, float(np.abs(new - old).max() / max(1.0, np.abs(old).max())))
    found = world.written.agreement

    assert found is not None
    # Batches of another size round otherwise: one answer of 3,590 may be a tie.
    assert same / total == pytest.approx(found.agreement.value, abs=1.5 / total)
    change = (right_after - right_before) / total
    assert change == pytest.approx(found.accuracy_change.value, abs=1.5 / total)
    assert shift == pytest.approx(found.largest_shift, rel=1e-2)
    assert 0 < same < total


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bundles_made_on_float_pass_the_golden_gate_of_int8(world: World, strategy: str) -> None:
    """Within the tolerance of the variant, and it takes that: float's would refuse them."""
    bundle, int8 = world.made[strategy].bundle, world.engines["int8"]
    strict = world.manifest.model_copy(update={"golden_tolerance": {"fp32": 1e-3, "int8": 1e-3}})
    as_float = Engine(world.files[TRUNK_INT8], strict, precision="int8")
    as_float.families = int8.families

    assert verdict(bundle, world.engines["fp32"]) == ("golden", True)
    assert verdict(bundle, int8) == ("golden", True)
    assert verdict(bundle, as_float) == ("golden", False)


def test_swapped_labels_are_caught_in_spite_of_the_wide_tolerance(world: World) -> None:
    """Every logit is then off by more than the variant moves it."""
    swapped = with_head(world.made["head"].bundle, lambda weight: weight[..., ::-1])

    assert verdict(swapped, world.engines["int8"]) == ("golden", False)


def test_a_small_fault_of_a_head_is_caught_on_float_only(world: World) -> None:
    """Such as a bias that is off by a third of the tolerance, as the page on precision says."""
    bundle = world.made["head"].bundle
    scale = max(1.0, float(np.abs(load(bundle.files[GOLDEN])["logits"]).max()))
    offset = np.array(world.manifest.golden_tolerance["int8"] * scale / 3, np.float32)
    biased = with_head(bundle, lambda weight: weight + offset if weight.ndim == 1 else weight)

    assert verdict(biased, world.engines["fp32"]) == ("golden", False)
    assert verdict(biased, world.engines["int8"]) == ("golden", True)


def with_head(
    bundle: Bundle, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> Bundle:
    """The same golden samples, with other weights of the head: [..., labels]."""
    model = onnx.load_model_from_string(bundle.files[HEAD])
    for stored in model.graph.initializer:
        weight, num_labels = numpy_helper.to_array(stored), len(bundle.manifest.labels)
        is_transposed = weight.shape[-1] != num_labels
        changed = change(weight.T).T if is_transposed else change(weight)
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), stored.name))
    files = {name: bundle.files[name] for name in bundle.manifest.files}
    fields = bundle.manifest.model_dump(exclude={"files"})
    return Bundle.pack({**files, HEAD: model.SerializeToString()}, **fields)


@pytest.mark.parametrize("strategies", [STRATEGIES, ("lora", "tail")], ids=["all", "no heads"])
def test_heads_adapters_and_tails_share_the_prefix_of_the_variant(
    world: World, tmp_path: Path, strategies: tuple[str, ...]
) -> None:
    """Rows mixed in one batch: adapters and tails are what PyTorch makes of the INT8 maps.

    Where no head is asked the engine runs the prefix alone.
    """
    pictures = world.pictures[:BATCH]
    mixed = asked(world, "int8", tmp_path, strategies)
    session = open_session(world.files[TRUNK_INT8])
    plain, maps = (
        torch.from_numpy(np.asarray(found))
        for found in session.run(["features", "prefix"], {"images": pictures})
    )
    trained = {s: made.trained for s, made in world.made.items()}
    with torch.no_grad():
        expected = {
            "head": trained["head"].head.head(plain),
            **{s: t.special.tail.eval()(maps) for s, t in trained.items() if t.special},
        }
    for strategy in strategies:
        found = expected[strategy]
        centred = (found - found.mean(dim=1, keepdim=True)).numpy()
        # Float fusion moves logits by 1e-5 of their scale; scores near 0 and 1 round.
        np.testing.assert_allclose(mixed[strategy], centred, atol=5e-3)


def test_adapters_and_tails_on_int8_maps_stay_within_the_tolerance(
    world: World, tmp_path: Path
) -> None:
    """And they do move: the maps are those of the variant."""
    tolerance = world.manifest.golden_tolerance["int8"]
    int8, fp32 = (asked(world, precision, tmp_path) for precision in ("int8", "fp32"))
    for strategy in STRATEGIES:
        scale = max(1.0, float(np.abs(fp32[strategy]).max()))
        shift = np.abs(int8[strategy] - fp32[strategy]).max()
        assert 1e-3 * scale < shift <= tolerance * scale


def asked(
    world: World, precision: Precision, folder: Path, strategies: tuple[str, ...] = STRATEGIES
) -> dict[str, NDArray[np.float32]]:
    """Centred logits of every strategy, all asked of the same pictures in one batch."""
    engine, pictures = world.engines[precision], world.pictures[:BATCH]
    loader = HeadLoader(
        HeadLog(str(folder / precision)), engine, adapter_memory_bytes=2**20, picture_s=1e-3
    )
    live = {
        strategy: loader.load(
            TaskChange(
                task=strategy, version=1, action="push", bundle=made.bundle.digest,
                labels=made.data.labels,
            ),
            made.bundle,
        )
        for strategy in strategies
        for made in [world.made[strategy]]
    }  # fmt: skip
    assert loader.adapters.pin(list(live.values()))
    rows = [Row(place, live[s]) for place in range(len(pictures)) for s in strategies]
    scores = engine.run(pictures, rows)
    loader.adapters.close()
    return {s: logits(scores[place :: len(strategies)]) for place, s in enumerate(strategies)}
