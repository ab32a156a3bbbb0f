"""What a bundle is told beside what is live of its task."""

from __future__ import annotations

from copy import copy
from functools import partial as with_first
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from export.bundle import HELDOUT, Bundle, digest_of
from serve import latency_gate
from serve.accuracy_gate import check_accuracy
from serve.contender import Contender, Source, Takes
from serve.engine import Engine
from serve.graph_gate import GateError
from serve.grounds import Grounds
from serve.latency_gate import Slowdown, Way, check_latency, measure
from serve.live_gates import compare
from serve.record import Verdict
from serve.tango import Paired, is_worse
from tests.serve.exams import PERFECT, exam_of, heldout, partial, right
from tests.serve.graphs import head_model, node
from tests.serve.test_gates import BundleMaker, changed
from tests.serve.tiny import TinyTrunk

NUM = 200
SAMPLE = heldout(NUM)
COLOURS = ("red", "green", "blue")


def grounds(**fields: Any) -> Grounds:
    """A task with a live version and a sample."""
    usual: dict[str, Any] = {
        "version": 1, "live": digest_of(b"live"), "labels": COLOURS, "has_new_labels": False,
        "heldout": digest_of(SAMPLE), "takes_heldout": False, "margin": 0.01, "max_slowdown": 1.5,
        "trunk": None,
    }  # fmt: skip
    return Grounds(**{**usual, **fields})


FIRST = grounds(version=0, live=None, labels=None, heldout=None, takes_heldout=True)


def verdicts(
    bundle: Bundle,
    other: Bundle | None,
    engine: Engine,
    *,
    sample: bytes | None = SAMPLE,
    declared: bool = False,
    **fields: Any,
) -> dict[str, Verdict]:
    """Those of a comparison, by gate."""
    ground, exam = grounds(**fields), None
    if sample is None:
        ground = grounds(**{"heldout": None, **fields})
    else:
        exam = exam_of(sample)
    found = compare(
        bundle, other, exam, ground, engine, engine, task="colours", allow_new_labels=declared
    )
    return {verdict.gate: verdict for verdict in found}


def test_a_head_that_is_as_good_passes_and_is_told_the_figures(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Accuracies, pictures, difference and interval."""
    told = verdicts(make_bundle(weight=2 * PERFECT), make_bundle(weight=PERFECT), engine)

    assert list(told) == ["labels", "heldout", "accuracy", "latency"]
    assert all(verdict.passed and not verdict.skipped for verdict in told.values())
    assert "accuracy 1.000 against 1.000" in told["accuracy"].reason
    assert "200 held-out pictures: a difference of +0.000 (-0.0" in told["accuracy"].reason
    assert "the margin is 0.01" in told["accuracy"].reason


def test_a_head_that_is_worse_is_refused_and_told_the_setting(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Beyond margin and chance; the gates after it are not asked."""
    worse = right(partial(0.3)).mean()
    told = verdicts(make_bundle(weight=partial(0.3)), make_bundle(weight=PERFECT), engine)
    refused = told["accuracy"]

    assert worse < 0.95
    assert list(told) == ["labels", "heldout", "accuracy"]
    assert not refused.passed
    assert f"accuracy {worse:.3f} against 1.000" in refused.reason
    assert "headstock task set colours margin=" in refused.reason


def test_the_margin_that_a_refusal_names_is_enough(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Whoever sets it gets the push through."""
    worse, live = make_bundle(weight=partial(0.3)), make_bundle(weight=PERFECT)
    reason = verdicts(worse, live, engine)["accuracy"].reason
    margin = float(reason.rpartition("margin=")[2].rstrip("."))

    assert verdicts(worse, live, engine, margin=margin)["accuracy"].passed
    assert margin < 0.2


def test_a_head_that_is_better_passes(engine: Engine, make_bundle: BundleMaker) -> None:
    """However much."""
    told = verdicts(make_bundle(weight=PERFECT), make_bundle(weight=partial(0.3)), engine)

    assert told["accuracy"].passed
    assert "a difference of +0." in told["accuracy"].reason


def test_a_small_sample_says_what_it_could_not_see(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """The drop that would have shown is one that is refused, and the next smaller one is not."""
    mine, live = (Contender(make_bundle(weight=w), engine) for w in (PERFECT, 2 * PERFECT))
    told = check_accuracy(mine, live, exam_of(heldout(30)), task="colours", margin=0.01)

    assert "the sample is too small to tell a drop of 0.01 from chance" in told
    assert "only a drop of 0.167 or more would have shown" in told  # 5 of 30
    assert is_worse(Paired(30, 0, 5), margin=0.01)
    assert not is_worse(Paired(30, 0, 4), margin=0.01)


@pytest.mark.parametrize(
    ("fields", "sample", "gate", "reason"),
    [
        ({"live": None}, SAMPLE, "accuracy", "nothing is live to compare with"),
        (
            {"has_new_labels": True, "labels": ("a", "b")},
            SAMPLE, "accuracy", "the labels change, so what is live answers another",
        ),
        ({}, None, "accuracy", "no held-out sample to compare on; set one with headstock"),
        ({}, None, "heldout", "neither the task nor the bundle has a held-out sample"),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_look_says_why_and_is_seen_to_be_skipped(
    engine: Engine,
    make_bundle: BundleMaker,
    fields: dict[str, Any],
    sample: bytes | None,
    gate: str,
    reason: str,
) -> None:
    """It refuses nothing, and the others go on."""
    live = None if "live" in fields else make_bundle(weight=PERFECT)
    worse = make_bundle(weight=-PERFECT)
    told = verdicts(worse, live, engine, sample=sample, declared=True, **fields)

    assert (told[gate].passed, told[gate].skipped) == (True, True)
    assert reason in told[gate].reason
    assert "latency" in told


def test_labels_are_a_gate(engine: Engine, make_bundle: BundleMaker) -> None:
    """Others than callers know are refused unless the change is declared."""
    other: dict[str, Any] = {"labels": ("red", "green", "violet"), "has_new_labels": True}
    bundle, live = make_bundle(weight=PERFECT), make_bundle(weight=PERFECT)
    undeclared = verdicts(bundle, live, engine, **other)
    declared = verdicts(bundle, live, engine, declared=True, **other)
    first = compare(
        bundle, None, None, FIRST, engine, engine, task="colours", allow_new_labels=False
    )

    assert list(undeclared) == ["labels"]
    assert "gone: ['violet'], new: ['blue']" in undeclared["labels"].reason
    assert declared["labels"].passed
    assert "the change is declared" in declared["labels"].reason
    assert first[0].reason == "the task's first 3 labels"


@pytest.mark.parametrize(
    ("fields", "brings", "reason"),
    [
        ({"takes_heldout": True, "heldout": None}, SAMPLE, "its 200 held-out pictures are the"),
        ({}, SAMPLE, "brings the task's own held-out sample"),
        ({}, heldout(50, seed=1), "a held-out sample that is not used: the task has its own"),
        ({"heldout": None}, SAMPLE, "is not used: the task went live without one"),
        ({}, None, "the task has a held-out sample"),
    ],
)
def test_the_verdict_says_what_becomes_of_a_bundles_sample(
    engine: Engine,
    make_bundle: BundleMaker,
    fields: dict[str, Any],
    brings: bytes | None,
    reason: str,
) -> None:
    """A pusher does not choose the exam."""
    bundle = make_bundle(weight=PERFECT, heldout=brings)
    sample = None if fields.get("heldout", 0) is None else SAMPLE
    told = verdicts(bundle, make_bundle(weight=PERFECT), engine, sample=sample, **fields)

    assert reason in told["heldout"].reason
    assert told["heldout"].passed


def test_a_bundle_with_a_sample_that_is_none_is_refused(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Whether it would be used or not."""
    bundle = make_bundle(weight=PERFECT, heldout=b"nothing")
    told = verdicts(bundle, make_bundle(weight=PERFECT), engine)

    assert not told["heldout"].passed
    assert f"{HELDOUT} cannot be read" in told["heldout"].reason


def slow() -> bytes:
    """A head of wide products that end in its inputs, which are not negative."""
    wide = 1024
    names = ["positive", *(f"wide{place}" for place in range(15)), "logits"]
    widths = [3, *[wide] * 15, 3]
    nodes = [
        node("MatMul", f"{a} weight{place}", b) for place, (a, b) in enumerate(pairwise(names))
    ]
    weights = {
        f"weight{place}": np.eye(*shape, dtype=np.float32)
        for place, shape in enumerate(pairwise(widths))
    }
    first = node("Relu", "features", "positive")  # or they would be recognised as one product
    return head_model([first, *nodes], weights).SerializeToString()


def test_a_head_that_takes_much_longer_is_refused_and_told_the_setting(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """By what was measured against the live one; with the setting that it names it passes."""
    heavy = Contender(make_bundle(weight=PERFECT, graph=slow()), engine)
    plain = Contender(make_bundle(weight=PERFECT), engine)
    with pytest.raises(GateError, match=r"measured 3 times; at most 1\.5 x") as refused:
        check_latency(heavy, plain, task="colours", max_slowdown=1.5)
    asked = float(str(refused.value).rpartition("max_slowdown=")[2].rstrip("."))

    assert "x in batches of 1, " in str(refused.value)
    assert check_latency(heavy, plain, task="colours", max_slowdown=2 * asked)
    assert "what is live" in check_latency(heavy, heavy, task="c", max_slowdown=1.5)


def test_a_first_push_is_measured_and_not_refused(engine: Engine, make_bundle: BundleMaker) -> None:
    """However slow: its task has no settings yet that could allow it."""
    heavy = Contender(make_bundle(weight=PERFECT, graph=slow()), engine)
    told = check_latency(heavy, None, task="colours", max_slowdown=1.5)
    ratio = float(told.removeprefix("answers take ").partition(" x")[0])

    assert ratio > 1.5
    assert "the time of a plain head; nothing is live to be slower than" in told


def test_a_slow_down_that_nobody_would_notice_is_none(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten times of a few microseconds are less than decoding a picture takes."""
    tried = [Slowdown(1, 10.0, 1e-4, 4e-4), Slowdown(1, 10.0, 1e-4, 6e-4)]
    plain = Contender(make_bundle(weight=PERFECT), engine)

    def told(slowdown: Slowdown) -> str:
        def measured(*_: object, **__: object) -> Slowdown:
            return slowdown

        monkeypatch.setattr(latency_gate, "measure", measured)
        return check_latency(plain, plain, task="colours", max_slowdown=1.5)

    assert "10.00 x" in told(tried[0])
    with pytest.raises(GateError, match=r"10\.00 x"):
        told(tried[1])


def test_one_attempt_in_which_all_is_well_is_enough(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise makes a good head look slow once or twice, a slow one never fast."""
    ratios = iter([9.0, 9.0, 9.0, 1.0, 1.0, 1.0])
    plain = Contender(make_bundle(weight=PERFECT), engine)

    def measured(*_: object, batch: int) -> Slowdown:
        return Slowdown(batch, next(ratios), 1e-3, 1.0)

    monkeypatch.setattr(latency_gate, "measure", measured)

    assert "1.00 x in batches of 1, 1.00 x in batches of 8" in check_latency(
        plain, plain, task="colours", max_slowdown=1.5
    )


class Noted:
    """A trunk whose runs are noted, and ways that start from it."""

    def __init__(self, engine: Engine, name: str, order: list[str]) -> None:
        self._engine, self._order = copy(engine), order
        for takes in ("features", "prefix"):
            setattr(self._engine, takes, with_first(self._give, f"{name} {takes}"))

    def way(self, name: str, takes: Takes = "features") -> Way:
        """One whose answers are noted too."""
        return Way(Source(self._engine, takes), lambda _: self._order.append(name))

    def _give(self, what: str, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        self._order.append(f"{what} of {len(pictures)} at {pictures.shape[1]} px")
        return np.zeros((len(pictures), 3), np.float32)


def test_both_are_run_in_turn_after_one_run_of_the_trunk(engine: Engine) -> None:
    """So that whatever else the machine does meets both; each comes first in every other round."""
    order: list[str] = []
    noted, trunk = Noted(engine, "trunk", order), "trunk features of 8 at 8 px"
    measure(noted.way("a"), noted.way("b"), batch=8)

    assert order[:6] == [trunk, "a", "b", trunk, "a", "b"]  # the first run of a size allocates
    assert order[6:9] == [trunk, "b", "a"]
    assert len(order) >= 3 * 4


def test_what_starts_from_something_else_has_its_own_run_of_the_trunk(engine: Engine) -> None:
    """Prefix maps take another time than features."""
    order: list[str] = []
    noted = Noted(engine, "trunk", order)
    measure(noted.way("a"), noted.way("b", "prefix"), batch=1)

    assert order[:4] == ["trunk features of 1 at 8 px", "a", "trunk prefix of 1 at 8 px", "b"]


def test_on_two_trunks_each_has_its_own_run_of_its_own_pictures(
    engine: Engine, tmp_path: Path
) -> None:
    """Those of the new one may be larger."""
    order: list[str] = []
    larger = TinyTrunk(tmp_path / "larger", size_px=12, roll=1, scale=0.02).engine
    new, old = Noted(larger, "new", order), Noted(engine, "old", order)
    measure(new.way("a"), old.way("b"), batch=1)

    new_runs, old_runs = "new features of 1 at 12 px", "old features of 1 at 8 px"
    assert order[:4] == [new_runs, "a", old_runs, "b"]
    assert order[8:12] == [old_runs, "b", new_runs, "a"]


def test_the_trunks_time_counts_for_both(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that takes twice as long beside a trunk that takes ten times as long: 12 to 11."""
    now_s = 0.0

    def spend(seconds: float) -> NDArray[np.float32]:
        nonlocal now_s
        now_s += seconds
        return np.zeros((1, 3), np.float32)

    monkeypatch.setattr(latency_gate.time, "thread_time", lambda: now_s)

    def features(_: NDArray[np.uint8]) -> NDArray[np.float32]:
        return spend(10.0)

    monkeypatch.setattr(engine, "features", features)
    source = Source(engine, "features")
    slow, quick = Way(source, lambda _: spend(2.0)), Way(source, lambda _: spend(1.0))

    assert measure(slow, quick, batch=1) == Slowdown(1, 12 / 11, 11.0, 1.0)


def test_a_change_of_the_manifest_alone_changes_no_answer(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Temperature and link say how sure a head is, not which label is first."""
    plain = make_bundle(weight=partial(0.3))
    sure = changed(plain, temperature=0.1, link="none")
    contenders = [Contender(plain, engine), Contender(sure, engine)]
    one, other = exam_of(SAMPLE).right_answers(contenders)

    np.testing.assert_array_equal(one, other)
