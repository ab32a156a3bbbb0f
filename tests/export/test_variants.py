"""Which precisions are written and picked, from real digits to the trunk's folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from export.agreement import Agreement, HeadOutcome, judge
from export.bundle import TRUNK_FP16, TRUNK_INT8, Precision, Provenance, read_trunk_folder
from export.errors import ExportError
from export.latency import speedup
from export.precision import Candidate, fastest
from export.recipe import make_trunk
from export.trial import make_trial
from export.trunk import export_trunk, trunk_graph
from export.variants import (
    SHIFT_MARGIN,
    PrecisionRefusedError,
    Variants,
    calibration_pictures,
    choose_variants,
)
from models.backbones import Backbone
from models.checkpoint import save_student
from models.data import PictureData, Split
from models.digits import load_digit_task
from models.evaluate import Estimate
from models.recipe import SAMPLES
from models.record import TaskRecord

GRAPH = b"float graph"


@pytest.fixture(scope="module")
def digits() -> PictureData:
    """Ten labels, so ten heads of one label against the rest and one of all."""
    return load_digit_task("digits", seed=0)


@pytest.fixture(scope="module")
def student_folder(
    student: Backbone,
    pictures: torch.Tensor,
    digits: PictureData,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A student as `headstock distil` leaves it."""
    folder = tmp_path_factory.mktemp("student")
    task = TaskRecord(labels=digits.labels, teacher="none", data=digits.record())
    save_student(folder, student, tasks=(task,), metrics={}, seed=0, command="test")
    save_file({"pictures": pictures}, folder / SAMPLES)
    return folder


def agreement(*, share: float = 1.0, shift: float = 0.1) -> Agreement:
    """Of ten heads with 100 pictures each, of which so many are answered alike."""
    agrees = np.arange(1000) < round(1000 * share)
    heads = [
        HeadOutcome(
            f"head{n}",
            tuple(f"{n}-{place}" for place in range(100)),
            agrees[n::10],
            np.ones(100, bool),
            np.ones(100, bool),
            shift,
        )
        for n in range(10)
    ]
    return judge(heads)


def candidate(
    precision: Precision, speed: float, found: Agreement | None, *, width: float = 0.0
) -> Candidate:
    """One whose speed is known up to a width."""
    ratio = Estimate(speed, speed - width, speed + width, 9)
    name = f"{precision} {speed}"
    return Candidate(precision, name, name.encode(), 1.0, ratio, found)


FLOAT = candidate("fp32", 1.0, None)
GOOD, BAD = agreement(), agreement(share=0.9)


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        ([candidate("int8", 2.0, GOOD), candidate("int8", 1.5, GOOD)], 2.0),
        ([candidate("int8", 2.0, BAD), candidate("int8", 1.5, GOOD)], 1.5),
        ([candidate("int8", 2.0, BAD)], 1.0),
        ([candidate("int8", 0.6, GOOD)], 1.0),
        ([candidate("int8", 1.1, GOOD, width=0.2)], 1.0),
        ([candidate("fp16", 2.0, GOOD)], 1.0),
    ],
    ids=["fastest", "fastest accepted", "none accepted", "slower", "unsure", "fp16 is for CUDA"],
)
def test_the_fastest_that_is_accepted_is_picked(
    candidates: list[Candidate], expected: float
) -> None:
    """Which may be float."""
    assert fastest([FLOAT, *candidates]).speed_ratio.value == expected


def test_auto_writes_what_is_picked_and_nothing_else() -> None:
    """A variant that would not be served is not worth its megabytes."""
    faster, slower = candidate("int8", 2.0, GOOD), candidate("int8", 0.6, GOOD)

    assert set(choose_variants([FLOAT, faster], "auto").graphs) == {"int8"}
    assert choose_variants([FLOAT, faster], "auto").picked == "int8"
    assert choose_variants([FLOAT, slower], "auto").graphs == {}
    assert choose_variants([FLOAT, candidate("int8", 2.0, BAD)], "auto").picked == "fp32"


def test_a_variant_that_was_asked_for_is_written_though_float_is_faster_here() -> None:
    """Other machines may serve it; this one's CPU is told to serve float."""
    slow = [candidate("int8", speed, GOOD) for speed in (0.5, 0.6, 0.4)]
    variants = choose_variants([FLOAT, *slow], "int8")

    assert (variants.graphs, variants.picked) == ({"int8": b"int8 0.6"}, "fp32")


def test_the_tolerance_is_what_was_measured_with_a_margin() -> None:
    """And never below that of the float graph."""
    one = choose_variants([FLOAT, candidate("int8", 2.0, agreement(shift=0.1))], "int8")
    tiny = choose_variants([FLOAT, candidate("fp16", 1.0, agreement(shift=1e-9))], "fp16")

    assert one.golden_tolerance == {"int8": pytest.approx(SHIFT_MARGIN * 0.1)}
    assert tiny.golden_tolerance == {"fp16": 1e-3}


def test_a_refusal_names_every_candidate_and_its_reason() -> None:
    """And what to do."""
    bad = candidate("int8", 2.0, BAD)
    with pytest.raises(PrecisionRefusedError) as error:
        choose_variants([FLOAT, bad], "int8")
    assert str(error.value) == (
        "No int8 trunk gives what the float trunk gives; nothing was written. int8 2.0: agreement "
        "90.0% below 98.5%. Export with --precision auto or fp32, or give more --data."
    )
    assert error.value.candidates == (FLOAT, bad)


def test_heads_are_ten_at_least_and_judge_the_float_trunk_as_equal(
    student: Backbone, digits: PictureData
) -> None:
    """Nothing differs from itself; the heads know their digits far better than chance."""
    graph = trunk_graph(student)
    trial = make_trial(graph, [digits], student.preprocessing)
    found = judge(trial.outcomes(graph, stage="float"))

    assert [head.name for head in trial.heads[:3]] == [
        "digits",
        "digits: 0 or not",
        "digits: 1 or not",
    ]
    assert found.num_heads == 10
    assert (found.agreement.value, found.largest_shift) == (1.0, 0.0)
    assert trial.outcomes(graph, stage="float")[0].before.mean() > 0.5


def test_heads_refuse_the_features_of_another_trunk(
    student: Backbone, digits: PictureData, build: Callable[..., Backbone]
) -> None:
    """The trial can fail."""
    trial = make_trial(trunk_graph(student), [digits], student.preprocessing)
    found = judge(trial.outcomes(trunk_graph(build("small32", seed=9)), stage="other"))

    assert not found.is_accepted
    assert "digits" in found.significantly_worse


def test_heads_learn_nothing_from_test_pictures(student: Backbone, digits: PictureData) -> None:
    """With every test label wrong they are the same heads, and all their answers are."""
    graph = trunk_graph(student)
    wrong = (digits.test.labels + 1) % 10
    other = dataclasses.replace(digits, test=Split(digits.test.pictures[:50], wrong[:50]))
    whole, _ = make_trial(graph, [digits], student.preprocessing).heads[:2]
    again, _ = make_trial(graph, [other], student.preprocessing).heads[:2]

    torch.testing.assert_close(whole.head.weight, again.head.weight, atol=0, rtol=0)
    assert again.labels.tolist() == wrong[:50].tolist()


def test_tasks_on_the_same_pictures_are_known_by_them(
    student: Backbone, digits: PictureData
) -> None:
    """Answers to one picture are drawn together, so that intervals do not become too narrow."""
    parity = load_digit_task("parity", seed=0)
    trial = make_trial(trunk_graph(student), [digits, parity], student.preprocessing)

    assert trial.keys[0] == trial.keys[1] == tuple(p.key for p in digits.test.pictures)
    assert len(set(trial.keys[0])) > 0.9 * len(digits.test)


def test_too_few_heads_are_said_before_anything_is_computed(student: Backbone) -> None:
    """Two labels make one head, since one label against the rest is the same question."""
    parity = load_digit_task("parity", seed=0)

    with pytest.raises(ExportError, match=r"give 1 heads .* at least 10"):
        make_trial(b"no graph is read", [parity], student.preprocessing)


def test_calibration_takes_train_pictures_of_all_labels(
    student: Backbone, digits: PictureData
) -> None:
    """Never one of those that the heads are judged on."""
    pictures = calibration_pictures([digits], student.preprocessing)
    pixels = {
        picture.pixels(student.preprocessing).tobytes(): label
        for picture, label in zip(digits.train.pictures, digits.train.labels.tolist(), strict=True)
    }

    assert len(pictures) == 64
    assert {pixels[picture.tobytes()] for picture in pictures} == set(range(10))


def test_a_graph_is_as_fast_as_itself(student: Backbone, pictures: torch.Tensor) -> None:
    """Alternating rounds: what else the machine does meets both."""
    graph = trunk_graph(student)
    found = speedup(graph, graph, pictures.numpy()[:1])

    # A busy machine may halve the speed of single rounds; the median of nine stays near 1.
    assert 0.7 < found.value < 1.4
    assert found.low <= found.value <= found.high


def test_the_smaller_net_is_the_faster_one(
    student: Backbone, build: Callable[..., Backbone], pictures: torch.Tensor
) -> None:
    """The teacher of this student multiplies ten times as much: its time comes first."""
    teacher = trunk_graph(build("small32_teacher"))

    assert speedup(teacher, trunk_graph(student), pictures.numpy()[:1]).value > 1


def test_a_refused_precision_leaves_nothing_written(
    student_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is half-made."""

    def refuse(*_: object, **__: object) -> Variants:
        raise PrecisionRefusedError("int8", [FLOAT, candidate("int8", 2.0, BAD)])

    monkeypatch.setattr("export.recipe.find_variants", refuse)
    with pytest.raises(PrecisionRefusedError):
        make_trunk(student_folder, tmp_path / "trunk", precision="int8", command="test")

    assert not (tmp_path / "trunk").exists()


def test_int8_needs_data(student_folder: Path, tmp_path: Path) -> None:
    """The message says what to give."""
    with pytest.raises(ExportError, match="name at least one --data"):
        make_trunk(student_folder, tmp_path / "trunk", precision="auto", command="test")

    assert not (tmp_path / "trunk").exists()


def test_int8_is_a_variant_of_the_same_trunk(
    student: Backbone, pictures: torch.Tensor, tmp_path: Path, provenance: Provenance
) -> None:
    """One digest, so every head fits; a graph and a tolerance of its own."""
    variants = Variants({"int8": b"int8 graph"}, {"int8": 0.2}, "int8")
    report = export_trunk(
        student, pictures, tmp_path, provenance=provenance, find=lambda _: variants
    )
    manifest, files = read_trunk_folder(tmp_path)
    without = {name: entry for name, entry in manifest.files.items() if name != TRUNK_INT8}
    plain = manifest.model_copy(update={"files": without})

    assert report.digest == manifest.digest == plain.digest
    assert (manifest.precisions, manifest.picked) == (("fp32", "int8"), "int8")
    assert (files[TRUNK_INT8], manifest.golden_tolerance["int8"]) == (b"int8 graph", 0.2)


def test_half_needs_no_data(student_folder: Path, tmp_path: Path) -> None:
    """It is written, and a CPU is not told to serve it."""
    make_trunk(student_folder, tmp_path, precision="fp16", command="test")
    manifest, files = read_trunk_folder(tmp_path)

    assert TRUNK_FP16 in files
    assert (manifest.precisions, manifest.picked) == (("fp32", "fp16"), "fp32")
