"""From what was seen of a candidate and a task's rules to a verdict."""

from __future__ import annotations

import pytest

from serve.rollout import Trial, judge, total
from serve.task_settings import TaskSettings

RULES = TaskSettings()
FINE = Trial(served=1000, compared=1000, disagreed=20, slower=100, less_confident=50)


def test_the_counts_of_replicas_add_up() -> None:
    """Each field by itself."""
    seen = [Trial(1, 2, 3, 4, 5, 6), Trial(10, 20, 30, 40, 50, 60)]

    assert total(seen) == Trial(11, 22, 33, 44, 55, 66)
    assert total([]) == Trial()


def test_nothing_is_said_of_too_few_pictures() -> None:
    """However bad they look."""
    trial = Trial(compared=99, disagreed=99)

    assert judge(trial, RULES).verdict == "undecided"
    assert judge(trial, RULES).reason == "99 of at least 100 pictures compared"
    assert judge(Trial(compared=100, disagreed=100), RULES).verdict == "worse"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"failed": 60}, "60 of 2000 rows (3.00%) had no scores; at most 1.00% may"),
        ({"disagreed": 300}, "320 of 1000 rows (32.00%) got another label; at most 20.00% may"),
        ({"slower": 700}, "800 of 1000 rows (80.00%) took over 1.5 times as long; at most 50"),
        (
            {"less_confident": 400},
            "450 of 1000 rows (45.00%) got a best score lower by 0.1 or more; at most 30.00% may",
        ),
    ],
)
def test_each_rule_by_itself_finds_a_candidate_worse(bad: dict[str, int], reason: str) -> None:
    """The reason says what was seen, of how many, and what is allowed."""
    judgement = judge(FINE.plus(**bad), RULES)

    assert judgement.verdict == "worse"
    assert judgement.reason.startswith(reason)


def test_a_candidate_that_keeps_every_rule_is_good() -> None:
    """Once there is evidence for each rule; the reason gives the disagreement."""
    judgement = judge(FINE, RULES)

    assert judgement.verdict == "good"
    assert "20 of 1000 rows (2.00%) got another label" in judgement.reason


def test_a_candidate_at_the_edge_stays_undecided() -> None:
    """Neither worse nor good, and the reason names the rule that is open."""
    trial = Trial(served=1000, compared=1000, disagreed=200, slower=100, less_confident=50)

    judgement = judge(trial, RULES)

    assert judgement.verdict == "undecided"
    assert judgement.reason == "not yet clear: 200 of 1000 rows (20.00%) got another label"


def test_the_rules_are_the_tasks_own() -> None:
    """What is too much for one task is not for another."""
    trial = FINE.plus(disagreed=300)

    assert judge(trial, TaskSettings(max_disagreement=0.5)).verdict == "good"
    assert judge(trial, TaskSettings(max_disagreement=0.1)).verdict == "worse"
    assert judge(trial, TaskSettings(min_compared=5000)).verdict == "undecided"
