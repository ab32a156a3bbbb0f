"""What replicas count, and the sum that every caller reads."""

from __future__ import annotations

import pickle

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import LATENCY_BUCKETS_S, MAX_TASKS, OTHERS, Metrics, Report, fleet_text, merge

REQUESTS = "headstock_requests_total"
LABELS = (("route", "/predict/{task}"), ("status", "200"))


def counted(num_requests: int, *seconds: float) -> Report:
    """The report of a replica that answered so many requests, some of them timed."""
    metrics = Metrics()
    metrics.requests.labels("/predict/{task}", 200).inc(num_requests)
    for value in seconds:
        metrics.request_seconds.observe(value)
    return metrics.report([])


def value_of(report: Report, name: str, labels: tuple[tuple[str, str], ...] = ()) -> float:
    """One sample."""
    return next(
        value
        for family in report
        for sample, found, value in family.samples
        if (sample, found) == (name, labels)
    )


def test_samples_of_the_same_name_and_labels_add_up() -> None:
    """Those of other labels stay apart."""
    other = Metrics()
    other.requests.labels("/predict/{task}", 503).inc(7)
    merged = merge([counted(2), counted(3), other.report([])])

    assert value_of(merged, REQUESTS, LABELS) == 5
    assert value_of(merged, REQUESTS, (LABELS[0], ("status", "503"))) == 7


def test_histograms_add_up_bucket_by_bucket() -> None:
    """So that quantiles of the sum are the fleet's."""
    merged = merge([counted(0, 0.002, 0.3), counted(0, 0.02)])
    name = "headstock_request_seconds"
    up_to = {
        bucket: value_of(merged, f"{name}_bucket", (("le", str(float(bucket))),))
        for bucket in LATENCY_BUCKETS_S
    }

    assert (up_to[0.001], up_to[0.0025], up_to[0.025], up_to[0.5]) == (0, 1, 2, 3)
    assert value_of(merged, f"{name}_count") == 3
    assert value_of(merged, f"{name}_sum") == pytest.approx(0.322)


def test_merging_in_parts_is_merging_at_once() -> None:
    """The conductor adds those of the dead to those of the living, again and again."""
    reports = [counted(1, 0.1), counted(2, 0.2), counted(3, 0.3)]
    at_once, in_parts = merge(reports), merge([merge(reports[:2]), merge([]), reports[2]])

    assert [f.name for f in at_once] == [f.name for f in in_parts]
    assert value_of(at_once, REQUESTS, LABELS) == value_of(in_parts, REQUESTS, LABELS) == 6


def test_a_report_travels() -> None:
    """To the conductor's process and back out of a pickle it is the same."""
    report = counted(1, 0.1)

    assert pickle.loads(pickle.dumps(report)) == report  # noqa: S301


def test_when_a_counter_was_made_is_not_added_up() -> None:
    """A sum of points in time means nothing."""
    assert not [s for f in merge([counted(1)]) for s in f.samples if s[0].endswith("_created")]


def test_the_text_is_prometheus_with_live_versions_and_replicas() -> None:
    """Every family with its help and type, in a form that its own parser reads."""
    text = fleet_text([counted(2), counted(3)], {"pets": 4, "birds": 1}, replicas=2).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    versions = {s.labels["task"]: s.value for s in families["headstock_live_version"].samples}
    requests = next(s for s in families["headstock_requests"].samples if s.name == REQUESTS)

    assert versions == {"pets": 4, "birds": 1}
    assert families["headstock_replicas"].samples[0].value == 2
    assert (requests.labels, requests.value) == (dict(LABELS), 5)
    assert families["headstock_requests"].type == "counter"
    assert families["headstock_request_seconds"].type == "histogram"
    assert families["headstock_hold_seconds"].documentation


def rows_of(metrics: Metrics, tasks: list[str]) -> dict[str, float]:
    """What a report says of each task that it names."""
    (family,) = [f for f in metrics.report(tasks) if f.name == "headstock_task_rows"]
    return {dict(labels)["task"]: value for _, labels, value in family.samples}


def test_rows_are_counted_by_task() -> None:
    """A task of which nothing was asked is not named."""
    metrics = Metrics()
    for task, num in (("pets", 2), ("birds", 1), ("pets", 3)):
        metrics.count_rows(task, num)

    assert rows_of(metrics, ["cars", "pets", "birds"]) == {"pets": 5, "birds": 1}


def test_of_ten_thousand_tasks_a_hundred_are_named() -> None:
    """The first of the log by themselves, all others together; and the text is small."""
    metrics, tasks = Metrics(), [f"task{number}" for number in range(10_000)]
    for task in reversed(tasks):
        metrics.count_rows(task, 1)
    rows = rows_of(metrics, tasks)
    text = fleet_text([metrics.report(tasks)] * 2, dict.fromkeys(tasks, 7), replicas=2).decode()

    assert list(rows) == [*tasks[:MAX_TASKS], OTHERS]
    assert rows[OTHERS] == 9_900
    assert text.count("headstock_live_version{") == MAX_TASKS
    assert "headstock_live_tasks 10000.0" in text
    assert len(text) < 50_000


def test_a_fleet_without_replicas_still_has_a_text() -> None:
    """Nothing was counted, and that is no error."""
    text = fleet_text([[]], {}, replicas=0).decode()

    assert "headstock_replicas 0.0" in text
