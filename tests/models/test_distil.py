"""Specification of models/distil.py and models/pupil.py: teachers to one student."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from models.answers import Memory
from models.augment import DRAWINGS
from models.backbones import Backbone, build_backbone
from models.batches import UNKNOWN, Batch, TrainingPictures
from models.data import PictureData, Split
from models.digits import DigitTask, load_digit_task
from models.distil import Distillation, DistillationError, Lesson, distil
from models.feature_losses import feature_loss
from models.fine_tuning import fine_tuning
from models.heads import LinearHead, features_of
from models.logistic import logistic_head
from models.losses import label_loss, soft_target_loss
from models.methods import METHODS, MethodName, find_method
from models.pupil import Pupil
from models.transfer import teach


def untrained(name: str = "small32", seed: int = 0) -> Backbone:
    backbone, _ = build_backbone(name, weights=None, allow_untrained=True, seed=seed)
    return backbone


def part(split: Split, num: int, *, start: int = 0) -> Split:
    return Split(split.pictures[start : start + num], split.labels[start : start + num])


def some(task: DigitTask, *, start: int = 0, num: int = 60) -> PictureData:
    """A few pictures of every split; the splits are ordered by digit, so they are shuffled."""
    data = load_digit_task(task, seed=0)
    random = torch.Generator().manual_seed(0)

    def mixed(split: Split) -> Split:
        order = torch.randperm(len(split), generator=random)
        return Split(tuple(split.pictures[int(i)] for i in order), split.labels[order])

    return dataclasses.replace(
        data,
        train=part(mixed(data.train), num, start=start),
        validation=part(mixed(data.validation), 40),
        test=part(mixed(data.test), 40),
    )


def lesson(data: PictureData, *, seed: int = 9) -> Lesson:
    """A teacher with random features and a fitted head: it knows something."""
    backbone = untrained("small32_teacher", seed)
    features = features_of(backbone, data.train, stage="x")
    head = logistic_head(features, data.train.labels, num_classes=len(data.labels), l2=0.01)
    return Lesson(backbone, head, data.labels, data)


def quick(
    student: Backbone, *lessons: Lesson, seed: int = 0, method: MethodName = "cosine"
) -> Distillation:
    return distil(
        student, lessons, from_scratch=True, augmentation=DRAWINGS, seed=seed, num_epochs=2,
        method=METHODS[method],
    )  # fmt: skip


def batch_of(data: PictureData, student: Backbone) -> tuple[Batch, Tensor]:
    """One batch of training pictures, and its labels as of one lesson."""
    source = TrainingPictures(
        data.train.pictures, [student.preprocessing], augmentation=DRAWINGS, batch_size=30, seed=0
    )
    batch = next(iter(source.epoch(1)))
    return batch, data.train.labels[batch.rows][:, None]


def state_of(student: Backbone) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in student.state_dict().items()}


def test_the_same_seed_gives_the_same_student_bit_for_bit() -> None:
    """Whatever was drawn before; another seed gives another one."""
    one = lesson(some("digits"))
    first = state_of(quick(untrained(), one).student)
    torch.rand(5)
    again, other = quick(untrained(), one).student, quick(untrained(), one, seed=1).student

    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in first.items())
    assert any(not torch.equal(t, other.state_dict()[key]) for key, t in first.items())


def test_the_teacher_stays_as_it_is() -> None:
    """Its weights and its running statistics."""
    one = lesson(some("digits"))
    before = state_of(one.backbone)

    quick(untrained(), one)

    assert all(torch.equal(tensor, before[k]) for k, tensor in one.backbone.state_dict().items())


def test_labels_alone_ask_no_teacher() -> None:
    """Even a teacher that answers NaN does not matter."""
    one = lesson(some("digits"))
    nn.init.constant_(one.head.state_dict()["bias"], float("nan"))
    pupil = Pupil(untrained(), [one], METHODS["labels"], keeps_answers=False)

    assert torch.isfinite(pupil.loss(*batch_of(one.data, pupil.student)))


def test_without_distillation_the_student_does_not_depend_on_its_teacher() -> None:
    """The comparison that shows what distillation brings."""
    data = some("digits")
    good, bad = lesson(data), lesson(data, seed=10)

    plain = quick(untrained(), good, method="labels").student
    same = quick(untrained(), bad, method="labels").student
    taught = quick(untrained(), good).student

    stems = [one.state_dict()["prefix.stem.0.weight"] for one in (plain, same, taught)]
    assert torch.equal(stems[0], stems[1])
    assert not torch.equal(stems[0], stems[2])


def test_the_loss_is_soft_targets_plus_matched_features_averaged_over_lessons() -> None:
    """Written out for two teachers with a batch in which each label is known to one only."""
    lessons = (lesson(some("digits")), lesson(some("parity"), seed=3))
    method = find_method(
        "cosine", label_weight=0.3, soft_weight=0.7, hint_weight=2.0, temperature=3.0
    )
    pupil = Pupil(untrained(), lessons, method, keeps_answers=False).eval()
    student = pupil.student
    sizes = [student.preprocessing, lessons[0].backbone.preprocessing]
    source = TrainingPictures(
        lessons[0].data.train.pictures, sizes, augmentation=DRAWINGS, batch_size=30, seed=0
    )
    batch = next(iter(source.epoch(1)))
    digits = lessons[0].data.train.labels[batch.rows]
    is_first = torch.arange(len(digits)) % 2 == 0
    labels = torch.stack(
        [digits.where(is_first, UNKNOWN), (digits % 2).where(~is_first, UNKNOWN)], dim=1
    )

    loss = pupil.loss(batch, labels)

    features = student(batch.images[student.preprocessing])
    parts: list[Tensor] = []
    for at, one in enumerate(lessons):
        target = one.backbone(batch.images[one.backbone.preprocessing])
        logits = pupil.heads[at](features)
        soft = soft_target_loss(logits, one.head(target), temperature=3.0)
        hint = feature_loss(pupil.projections[at](features), target)
        parts.append(0.3 * label_loss(logits, labels[:, at]) + 0.7 * soft + 2.0 * hint)
    torch.testing.assert_close(loss, (parts[0] + parts[1]) / 2)


def test_two_teachers_share_a_pool_without_held_out_pictures() -> None:
    """Shared pictures count once; what either tests on is in nobody's pool."""
    digits, parity = some("digits"), some("parity", start=30)
    leak = dataclasses.replace(
        parity,
        train=Split(
            (*parity.train.pictures, digits.test.pictures[0]),
            torch.cat([parity.train.labels, torch.tensor([0])]),
        ),
    )

    result = quick(untrained(), lesson(digits), lesson(leak))

    keys = {p.key for split in (digits.train, parity.train) for p in split.pictures}
    assert result.num_pictures == len(keys) == 90
    assert [head.weight.shape[0] for head in result.heads] == [10, 2]
    assert set(result.metrics) == {
        f"{task}/{name}"
        for task in ("digits", "parity")
        for name in ("validation", "test", "teacher_validation", "teacher_test")
    }


def test_a_trained_student_keeps_its_statistics_and_starts_from_fitted_heads() -> None:
    """Random heads would first spoil what the trunk knows."""
    student = untrained()
    before = state_of(student)

    result = distil(
        student, [lesson(some("parity", num=200))], from_scratch=False, augmentation=None,
        seed=0, num_epochs=1,
    )  # fmt: skip

    for key, tensor in student.state_dict().items():
        if "running" in key:
            assert torch.equal(tensor, before[key])
    assert result.metrics["parity/test"].value > 0.7


def test_labels_of_other_data_are_refused() -> None:
    """Else class 3 of the teacher would be taught as class 3 of the data, whatever it is."""
    one = lesson(some("parity"))

    with pytest.raises(
        DistillationError, match=r"knows the labels \['even', 'odd'\], but loop has"
    ):
        dataclasses.replace(one, data=some("loop"))


@pytest.mark.parametrize("method", ["fitnets", "attention"])
def test_maps_are_compared_at_the_cut(method: MethodName) -> None:
    """A copy of the teacher has no attention to learn; for a hint it needs the right map."""
    one = lesson(some("parity"))
    pupil = Pupil(one.backbone, [one], METHODS[method], keeps_answers=False).eval()
    batch, labels = batch_of(one.data, pupil.student)
    unknown = torch.full_like(labels, UNKNOWN)

    untaught = pupil.loss(batch, unknown)
    if method == "fitnets":
        projection = pupil.projections[0]
        assert isinstance(projection, nn.Conv2d)
        assert projection.bias is not None
        nn.init.dirac_(projection.weight)
        nn.init.zeros_(projection.bias)
        assert untaught > 0.1
    torch.testing.assert_close(pupil.loss(batch, unknown), torch.tensor(0.0))


def test_a_teacher_is_asked_once_about_each_fixed_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in every epoch where views are drawn anew; the students are the same either way."""
    asked: list[int] = []
    one = lesson(some("parity"))
    forward = one.head.forward

    def counting(features: Tensor) -> Tensor:
        asked.append(len(features))
        return forward(features)

    monkeypatch.setattr(one.head, "forward", counting)

    def run(num_views: int | None) -> int:
        asked.clear()
        lessons = [dataclasses.replace(one, memory=Memory())]
        distil(
            untrained(), lessons, from_scratch=True, augmentation=DRAWINGS, seed=0, num_epochs=4,
            method=METHODS["kd"], num_views=num_views,
        )  # fmt: skip
        return sum(asked) - 80  # validation and test, which are asked about at the end

    assert [run(1), run(2), run(None)] == [60, 120, 240]


def test_unlabelled_pictures_join_the_pool_unless_they_are_held_out() -> None:
    """Of them the teacher alone speaks, so the label of one is nowhere asked for."""
    one = lesson(some("parity"))
    others = some("digits", start=200).train.pictures
    unlabelled = [*others, *one.data.test.pictures, *one.data.train.pictures]

    result = distil(
        untrained(), [one], from_scratch=True, augmentation=DRAWINGS, seed=0, num_epochs=1,
        unlabelled=unlabelled,
    )  # fmt: skip

    assert result.num_pictures == len({p.key for p in (*others, *one.data.train.pictures)}) == 120


def test_unlabelled_pictures_need_a_teacher() -> None:
    """By labels alone nothing can be learned from them."""
    one = lesson(some("parity"))

    with pytest.raises(DistillationError, match="40 unlabelled pictures, but this method asks no"):
        distil(
            untrained(), [one], from_scratch=True, augmentation=None, seed=0,
            method=METHODS["labels"], unlabelled=one.data.test.pictures,
        )  # fmt: skip


def test_the_last_student_can_be_kept() -> None:
    """As a fixed budget asks for, whatever validation says of it."""
    one = lesson(some("parity"))

    result = distil(
        untrained(), [one], from_scratch=True, augmentation=DRAWINGS, seed=0, num_epochs=3,
        keep_last=True,
    )  # fmt: skip

    assert result.best_epoch == 3


def test_blended_pictures_are_taught_by_the_teacher_alone() -> None:
    """Their labels do not matter, and their teacher sees the blend."""
    one = lesson(some("parity"))
    pupil = Pupil(untrained(), [one], METHODS["patient"], keeps_answers=False).eval()
    batch, labels = batch_of(one.data, pupil.student)

    torch.testing.assert_close(pupil.loss(batch, labels), pupil.loss(batch, 1 - labels))


def test_views_in_no_number_are_refused() -> None:
    """The message shows what was given."""
    with pytest.raises(DistillationError, match="num_views=0; expected at least 1"):
        distil(
            untrained(), [lesson(some("parity"))], from_scratch=True, augmentation=None, seed=0,
            num_views=0,
        )  # fmt: skip


def test_no_lesson_or_two_of_one_name_are_refused() -> None:
    """Metrics are told apart by name."""
    one = lesson(some("parity"))

    with pytest.raises(DistillationError, match="no teacher to learn from"):
        quick(untrained())
    with pytest.raises(DistillationError, match="Two lessons share a name"):
        quick(untrained(), one, copy.copy(one))


def test_a_pool_that_is_held_out_altogether_is_refused() -> None:
    """Two tasks that split the same pictures oppositely leave nothing to learn from."""
    data = some("parity")
    opposite = dataclasses.replace(data, name="other", train=data.test, test=data.train)

    with pytest.raises(DistillationError, match="No picture is left to learn from"):
        quick(untrained(), lesson(data), lesson(opposite))


@pytest.mark.slow
def test_the_digits_student_comes_within_two_points_of_its_teacher() -> None:
    """With an eighth of the parameters, from scratch in about 20 seconds on one core."""
    data = load_digit_task("digits", seed=0)
    taught = teach(
        untrained("small32_teacher"), data, fine_tuning("scratch"), augmentation=DRAWINGS, seed=0
    )
    own = Lesson(taught.backbone, taught.head, data.labels, data)

    result = distil(untrained(), [own], from_scratch=True, augmentation=DRAWINGS, seed=0)

    metrics = result.metrics
    assert metrics["digits/test"].value >= metrics["digits/teacher_test"].value - 0.02
    assert taught.backbone.num_parameters >= 5 * result.student.num_parameters
    assert isinstance(result.heads[0], LinearHead)
