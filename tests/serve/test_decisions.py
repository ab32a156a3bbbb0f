"""What is kept of the decisions about the number of replicas."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from serve.autoscale import Decision
from serve.decisions import MOST_KEPT, Decisions
from serve.metrics import fleet_text


def decision(before: int, replicas: int, rule: str = "rise") -> Decision:
    """From one number to another."""
    return Decision(replicas, rule, 1.0, 2.0, replicas, 0, before, 0.5, 4.0, 30.0)


def wanted(decisions: Decisions) -> dict[str, float]:
    """The metric as it is scraped: rule -> replicas."""
    families = text_string_to_metric_families(
        fleet_text([decisions.metrics()], {}, replicas=1).decode()
    )
    (family,) = [f for f in families if f.name == "headstock_replicas_wanted"]
    return {sample.labels["rule"]: sample.value for sample in family.samples}


def test_changes_are_kept_newest_first_and_no_more_than_some() -> None:
    """What changed nothing is the last decision, and no change."""
    decisions = Decisions()
    for number in range(2 * MOST_KEPT):
        decisions.take(decision(number, number + 1))
        decisions.take(decision(number + 1, number + 1, "steady"))
    count = decisions.count(3)

    assert count.answering == 3
    assert count.last is not None
    assert count.last.decision.rule == "steady"
    assert [made.decision.replicas for made in count.changes] == list(
        range(2 * MOST_KEPT, MOST_KEPT, -1)
    )


def test_the_metric_names_the_rule_that_decided_last() -> None:
    """One sample, so that the sum over rules is what is wanted."""
    decisions = Decisions()
    decisions.take(decision(1, 4))
    decisions.take(decision(4, 3, "fall"))

    assert wanted(decisions) == {"fall": 3.0}


def test_a_fixed_number_has_neither_metric_nor_decision() -> None:
    """Nobody decides."""
    decisions = Decisions()

    assert wanted(decisions) == {}
    assert decisions.count(2).last is None
