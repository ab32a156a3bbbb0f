"""A held-out sample, and what is remembered of it from one push to the next."""

from __future__ import annotations

from copy import copy
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from export.bundle import digest_of
from serve.contender import Contender
from serve.engine import Engine
from serve.exam import Exam, Kept
from serve.graph_gate import GateError
from serve.store import StoreError
from tests.serve.exams import PERFECT, exam, exam_of, heldout, partial, right
from tests.serve.graphs import constant_head
from tests.serve.specialised import LABELS, SpecialisedTrunk, some_pictures
from tests.serve.test_gates import BundleMaker
from tests.serve.tiny import TinyTrunk

NUM = 83  # the last batch is short
SAMPLE = heldout(NUM)


class Counted:
    """A replica's view of samples: what is read of the store, and what the trunk is run on."""

    def __init__(self, engine: Engine, patch: pytest.MonkeyPatch, kept: Kept | None = None) -> None:
        self.num_read, self.num_run = 0, 0
        self._kept = kept or Kept(engine.manifest.digest)
        features = engine.features

        def counted(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
            self.num_run += len(pictures)
            return features(pictures)

        patch.setattr(engine, "features", counted)

    def exam(self, sample: bytes) -> Exam:
        """The exam of one push."""

        def read(_: str) -> bytes:
            self.num_read += 1
            return sample

        return Exam(digest_of(sample), read, self._kept, num_labels=3)


def test_the_right_answers_are_numpys(engine: Engine, make_bundle: BundleMaker) -> None:
    """Picture by picture, for several heads at once; again from what is kept for the next ones."""
    kept = Kept(engine.manifest.digest)
    for weights in ([PERFECT, partial(0.3)], [partial(0.3), partial(1.0), -PERFECT]):
        contenders = [Contender(make_bundle(weight=weight), engine) for weight in weights]
        found = exam_of(SAMPLE, kept).right_answers(contenders)

        for mine, weight in zip(found, weights, strict=True):
            np.testing.assert_array_equal(mine, right(weight, NUM))


def test_the_trunk_runs_once_over_a_sample_and_the_next_push_reads_nothing(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is pushed."""
    weights = [partial(loss) for loss in (0.1, 0.2, 0.3)]
    contenders = [Contender(make_bundle(weight=weight), engine) for weight in weights]
    seen = Counted(engine, monkeypatch)
    for contender in contenders:
        seen.exam(SAMPLE).right_answers([contender])

    assert (seen.num_read, seen.num_run) == (1, NUM)


def test_a_bundle_that_was_judged_is_not_run_again(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is live at the next push; its answers are those of its own."""
    kept = Kept(engine.manifest.digest)
    contender = Contender(make_bundle(weight=partial(0.3)), engine)
    (before,) = exam_of(SAMPLE, kept).right_answers([contender])
    monkeypatch.setattr(Contender, "logits", None)
    (after,) = exam_of(SAMPLE, kept).right_answers([contender])

    np.testing.assert_array_equal(after, before)


def test_another_sample_is_another_exam(engine: Engine, make_bundle: BundleMaker) -> None:
    """Nothing kept of one answers for the other."""
    kept = Kept(engine.manifest.digest)
    contender = Contender(make_bundle(weight=partial(0.3)), engine)
    for seed in range(3):
        (found,) = exam_of(heldout(NUM, seed=seed), kept).right_answers([contender])

        np.testing.assert_array_equal(found, right(partial(0.3), NUM, seed=seed))


def test_what_does_not_fit_is_read_and_run_again(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same answers."""
    one, other = (Contender(make_bundle(weight=partial(loss)), engine) for loss in (0.3, 0.5))
    seen = Counted(engine, monkeypatch, Kept(engine.manifest.digest, budget_bytes=NUM * 4))
    found = [seen.exam(SAMPLE).right_answers([mine])[0] for mine in (one, one, other)]

    for mine, loss in zip(found, (0.3, 0.3, 0.5), strict=True):
        np.testing.assert_array_equal(mine, right(partial(loss), NUM))
    assert (seen.num_read, seen.num_run) == (2, 2 * NUM)  # the first one's answers are kept


TRUNK, OTHER = digest_of(b"trunk"), digest_of(b"other")


def test_arrays_keep_to_their_budget_and_the_oldest_go() -> None:
    """What is asked for is young again; what alone is too large is not kept."""
    kept, ten = Kept(TRUNK, budget_bytes=30), np.zeros(5, np.uint8)
    for name in ("a", "b", "c"):
        kept.put((TRUNK, name), ten, ten)
    kept.get((TRUNK, "a"))
    kept.put((TRUNK, "d"), ten, ten)
    kept.put((TRUNK, "e"), np.zeros(31, np.uint8))
    there = [kept.get((TRUNK, name)) is not None for name in "abcde"]

    assert there == [True, False, True, True, False]


def test_what_belongs_to_a_trunk_goes_with_it() -> None:
    """And what is only ready when its trunk has gone is not kept."""
    kept, ten = Kept(TRUNK, OTHER), np.zeros(10, np.uint8)
    kept.put((TRUNK, "a"), ten)
    kept.put((OTHER, "a"), ten)
    kept.only(OTHER)
    kept.put((TRUNK, "late"), ten)

    assert list(kept._arrays) == [(OTHER, "a")]


def test_room_is_made_before_there_is_more(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the trunk runs over another sample, what would not fit beside it has gone already."""
    kept = Kept(engine.manifest.digest, budget_bytes=NUM * 30)  # one sample: 12 and 8 a picture
    contender = Contender(make_bundle(weight=PERFECT), engine)
    features, beside = engine.features, list[int]()

    def watched(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        beside.append(sum(a.nbytes for arrays in kept._arrays.values() for a in arrays))
        return features(pictures)

    monkeypatch.setattr(engine, "features", watched)
    for seed in (0, 1):
        exam_of(heldout(NUM, seed=seed), kept).right_answers([contender])
    first, second = beside[: len(beside) // 2], beside[len(beside) // 2 :]

    assert set(first) == {0}
    assert second[0] == NUM * 21
    assert set(second[1:]) == {NUM}  # its right answers, a byte each


def right_on(trunk: TinyTrunk, weight: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which pictures of the sample a head gets right on a trunk, by numpy alone."""
    pictures, labels = exam(NUM)
    means = np.roll(pictures.astype(np.float64).mean(axis=(1, 2)), trunk.roll, axis=1)
    return (means @ weight.astype(np.float64)).argmax(axis=1) == labels


@pytest.fixture
def trunks(tmp_path: Path) -> tuple[TinyTrunk, TinyTrunk]:
    """Two that take the same pictures and give features in another order."""
    return (
        TinyTrunk(tmp_path / "old", size_px=8, roll=0, scale=0.01),
        TinyTrunk(tmp_path / "new", size_px=8, roll=1, scale=0.01),
    )


def test_each_starts_from_its_own_trunk_whatever_is_kept(
    trunks: tuple[TinyTrunk, TinyTrunk],
) -> None:
    """What the old one made of the sample answers for no head on the new one, and no way back."""
    kept = Kept(*(trunk.manifest.digest for trunk in trunks))
    bundle = trunks[0].bundle("colours", 0, weight=PERFECT)
    ours, theirs = (Contender(bundle, trunk.engine) for trunk in trunks)
    truths = [right_on(trunk, PERFECT) for trunk in trunks]
    (alone,) = exam_of(SAMPLE, kept).right_answers([ours])
    (other,) = exam_of(SAMPLE, kept).right_answers([theirs])
    together = exam_of(SAMPLE).right_answers([theirs, ours])
    again = exam_of(SAMPLE, kept).right_answers([theirs, ours])

    assert (truths[0] != truths[1]).mean() > 0.5
    np.testing.assert_array_equal([alone, other], truths)
    np.testing.assert_array_equal(together, truths[::-1])
    np.testing.assert_array_equal(again, truths[::-1])


def test_another_precision_is_another_trunk(trunks: tuple[TinyTrunk, TinyTrunk]) -> None:
    """A variant has its trunk's digest and gives other features."""
    kept = Kept(trunks[0].manifest.digest)
    variant = copy(trunks[1].engine)
    variant.manifest, variant.precision = trunks[0].manifest, "int8"
    bundle = trunks[0].bundle("colours", 0, weight=PERFECT)
    exam_of(SAMPLE, kept).right_answers([Contender(bundle, trunks[0].engine)])
    (found,) = exam_of(SAMPLE, kept).right_answers([Contender(bundle, variant)])

    np.testing.assert_array_equal(found, right_on(trunks[1], PERFECT))


def test_every_kind_is_compared_on_its_own_path(small_trunk: SpecialisedTrunk) -> None:
    """Head, adapters of both families and tail: the scores are PyTorch's, and so what is right."""
    tasks = [
        small_trunk.with_head("a", 1),
        small_trunk.with_adapter("b", "lora", 2),
        small_trunk.with_adapter("c", "ssf", 3),
        small_trunk.with_tail("d", 4),
    ]
    engine = small_trunk.engine()
    pictures = some_pictures(20, seed=9) // np.arange(1, 21, dtype=np.uint8)[:, None, None, None]
    labels = np.arange(20, dtype=np.int64) % len(LABELS)
    sample, kept = save({"pictures": pictures, "labels": labels}), Kept(engine.manifest.digest)
    contenders = [Contender(task.bundle, engine) for task in tasks]
    together = exam_of(sample, num_labels=len(LABELS)).right_answers(contenders)
    alone = [
        exam_of(sample, kept, num_labels=len(LABELS)).right_answers([contender])[0]
        for contender in contenders
    ]

    assert [contender.source.takes for contender in contenders] == ["features", *["prefix"] * 3]
    for contender, task, *found in zip(contenders, tasks, together, alone, strict=True):
        logits = contender.logits(contender.start(pictures))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores = exponentials / exponentials.sum(axis=1, keepdims=True)
        truth = task.truth(pictures)
        np.testing.assert_allclose(scores, truth, atol=1e-4)
        for mine in found:
            np.testing.assert_array_equal(mine, truth.argmax(axis=1) == labels)


def test_an_answer_that_is_not_finite_is_wrong(engine: Engine, make_bundle: BundleMaker) -> None:
    """Also where it is the right label that is infinite."""
    broken = Contender(make_bundle(graph=constant_head([np.inf, 0, 0])), engine)
    pictures = np.full((1, 8, 8, 3), 255, np.uint8)
    white = save({"pictures": pictures, "labels": np.zeros(1, np.int64)})
    (mine,) = exam_of(white).right_answers([broken])

    assert mine.tolist() == [False]


def test_a_sample_for_other_labels_is_refused_though_its_features_are_kept(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """The labels are looked at for each number of them."""
    kept = Kept(engine.manifest.digest)
    contender = Contender(make_bundle(weight=PERFECT), engine)
    exam_of(SAMPLE, kept).right_answers([contender])
    other = Contender(make_bundle(weight=partial(0.3)), engine)

    with pytest.raises(GateError, match="labels from 0 to 2; expected 0 to 1"):
        exam_of(SAMPLE, kept, num_labels=2).right_answers([other])


def test_a_store_that_is_away_is_no_verdict(engine: Engine, make_bundle: BundleMaker) -> None:
    """The push is not refused for what the bundle cannot help."""

    def away(_: str) -> bytes:
        raise StoreError("away")

    exam = Exam(digest_of(SAMPLE), away, Kept(), num_labels=3)
    with pytest.raises(StoreError, match="away"):
        exam.right_answers([Contender(make_bundle(weight=PERFECT), engine)])
