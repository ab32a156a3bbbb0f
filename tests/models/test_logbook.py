"""Specification of models/logbook.py: times and curves of a run."""

import pytest

from models import logbook
from models.logbook import Curve, Logbook, Phase
from models.progress import Progress


def test_the_time_before_a_step_counts_for_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are told when they are done; stages keep the order in which they began."""
    clock = iter([10.0, 11.0, 14.0, 14.5])
    monkeypatch.setattr(logbook.time, "monotonic", lambda: next(clock))
    book = Logbook()

    for stage in ("read", "fit", "read"):
        book(Progress(stage, 1, 2))

    assert book.phases == (Phase("read", 1.5), Phase("fit", 3.0))


def test_values_of_steps_become_curves_and_steps_go_on() -> None:
    """One for each stage and name; here a run goes on at its fourth epoch."""
    heard: list[Progress] = []
    book = Logbook(heard.append)
    steps = [
        Progress("teach", 4, 5, values={"loss": 2.0, "accuracy": 0.5}),
        Progress("teach", 5, 5, values={"loss": 1.0, "accuracy": 0.75}),
        Progress("test", 1, 1),
    ]

    for step in steps:
        book(step)

    assert book.curves == (
        Curve("teach", "loss", 4, (2.0, 1.0)),
        Curve("teach", "accuracy", 4, (0.5, 0.75)),
    )
    assert heard == steps
