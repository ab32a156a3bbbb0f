"""The gates that compare: a bundle beside what is live of its task, as the log stands."""

from __future__ import annotations

from collections.abc import Callable

from export.bundle import HELDOUT, Bundle
from serve.accuracy_gate import check_accuracy
from serve.contender import Contender
from serve.engine import Engine
from serve.exam import Exam
from serve.gates import GateSkippedError, run_gates
from serve.graph_gate import GateError
from serve.grounds import Grounds
from serve.heldout import HeldoutError, read_heldout
from serve.latency_gate import check_latency
from serve.proposal import new_labels_reason
from serve.record import Verdict


def compare(
    bundle: Bundle,
    live: Bundle | None,
    exam: Exam | None,
    grounds: Grounds,
    engine: Engine,
    live_engine: Engine,
    *,
    task: str,
    allow_new_labels: bool,
) -> tuple[Verdict, ...]:
    """Run the gates that compare, up to the first that says no.

    Args:
        engine: The trunk that the bundle is for.
        live_engine: The trunk that is served, mostly the same.
        bundle: One that passed `gates.admit`.
        live: The bundle of `grounds.live`, if there is one.
        exam: The sample of `grounds.heldout`, if there is one.

    Raises:
        StoreError: the sample cannot be read.
    """
    contender = Contender(bundle, engine)
    other = Contender(live, live_engine) if live else None

    def accuracy() -> str:
        if other is None:
            raise GateSkippedError("nothing is live to compare with")
        if grounds.has_new_labels:
            raise GateSkippedError("the labels change, so what is live answers another question")
        mine, theirs = engine.manifest.preprocessing, live_engine.manifest.preprocessing
        if (mine.size_px, mine.resize_px) != (theirs.size_px, theirs.resize_px):
            raise GateSkippedError(
                f"the new trunk takes pictures of {mine.size_px} px, out of {mine.resize_px}, and "
                f"the one that is served of {theirs.size_px} px, out of {theirs.resize_px}: no "
                "sample is decoded for both"
            )
        if exam is None:
            raise GateSkippedError(
                "the task has no held-out sample to compare on; set one with "
                f"headstock task heldout {task} BUNDLE"
            )
        if contender.head.is_multilabel != other.head.is_multilabel:
            raise GateSkippedError(
                "one of the two gives one label and the other any number: there is nothing to "
                "compare"
            )
        return check_accuracy(contender, other, exam, task=task, margin=grounds.margin)

    def latency() -> str:
        return check_latency(contender, other, task=task, max_slowdown=grounds.max_slowdown)

    checks: dict[str, Callable[[], str]] = {
        "labels": lambda: check_labels(bundle, grounds, allow_new_labels=allow_new_labels),
        "heldout": lambda: check_heldout(bundle, grounds, engine, task=task),
        "accuracy": accuracy,
        "latency": latency,
    }
    return run_gates(checks)


def check_labels(bundle: Bundle, grounds: Grounds, *, allow_new_labels: bool) -> str:
    """The labels are those that callers know, or the change is declared.

    Raises:
        GateError: they are others, and nobody said so.
    """
    labels = bundle.manifest.labels
    if grounds.labels is None:
        return f"the task's first {len(labels)} labels"
    if not grounds.has_new_labels:
        return f"the {len(labels)} labels that are live"
    if not allow_new_labels:
        raise GateError(new_labels_reason(grounds.labels, labels))
    return f"{len(labels)} labels, other than what was live; the change is declared"


def check_heldout(bundle: Bundle, grounds: Grounds, engine: Engine, *, task: str) -> str:
    """What becomes of the held-out sample that the bundle brings, if it brings one.

    Raises:
        GateError: it is none for this trunk and these labels.
        GateSkippedError: there is none anywhere.
    """
    data = bundle.files.get(HELDOUT)
    if data is None:
        if grounds.heldout is None:
            raise GateSkippedError("neither the task nor the bundle has a held-out sample")
        return "the task has a held-out sample"
    size_px = engine.manifest.preprocessing.size_px
    try:
        sample = read_heldout(data, size_px=size_px, num_labels=len(bundle.manifest.labels))
    except HeldoutError as error:
        raise GateError(str(error)) from error
    if sample.is_multilabel != (bundle.manifest.thresholds is not None):
        raise GateError(
            "The held-out sample is for a head that gives "
            f"{'any number of labels' if sample.is_multilabel else 'one label'}, and the bundle's "
            "head is not one. Bundle the sample of the head's own data."
        )
    if grounds.takes_heldout:
        return f"its {len(sample.labels)} held-out pictures are the task's from now on"
    if grounds.heldout == f"sha256:{bundle.manifest.files[HELDOUT].sha256}":
        return "brings the task's own held-out sample"
    has = "has its own" if grounds.heldout else "went live without one"
    return (
        f"brings a held-out sample that is not used: the task {has}, which only "
        f"headstock task heldout {task} changes"
    )
