"""Dashboard and alerts ask for what `/metrics` has, in PromQL that Prometheus' grammar takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import promql_parser as promql
import pytest
import yaml

from tests.serve.every_metric import metric_labels

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s" / "components" / "monitoring"
DOCS = (ROOT / "docs" / "observability.md").read_text()
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
(GROUP,) = yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())["spec"]["groups"]
ALERTS = {rule["alert"]: rule for rule in GROUP["rules"]}
# Grafana puts a span in its place; the parser knows none of its variables.
QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "1m")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
} | {name: rule["expr"] for name, rule in ALERTS.items()}
ALL = pytest.mark.parametrize("query", QUERIES.values(), ids=list(QUERIES))


def selectors(expression: object) -> Iterator[promql.VectorSelector]:
    """Every selector in a parsed query."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
        return
    for part in ("vector_selector", "expr", "lhs", "rhs", "param"):
        if (inner := getattr(expression, part, None)) is not None:
            yield from selectors(inner)
    for argument in getattr(expression, "args", None) or ():
        yield from selectors(argument)


@ALL
def test_every_metric_and_label_that_is_asked_for_exists(query: str) -> None:
    """By the names that the code gives them."""
    labels = metric_labels()
    found = list(selectors(promql.parse(query)))

    assert found
    for selector in found:
        assert selector.name in labels
        assert {m.name for m in selector.matchers.matchers} <= labels[selector.name]
    grouped = re.findall(r"by \(([^)]*)\)", query)
    names = {name.strip() for group in grouped for name in group.split(",")}
    assert names <= set.union(*(labels[str(selector.name)] for selector in found))


@ALL
def test_every_value_that_is_asked_for_is_documented(query: str) -> None:
    """A label's values are listed in the row of its metric."""
    for selector in selectors(promql.parse(query)):
        base = re.sub(r"_(bucket|sum|count)$", "", str(selector.name))
        (row,) = [line for line in DOCS.splitlines() if line.startswith(f"| `{base}` |")]
        for matcher in selector.matchers.matchers:
            assert all(f"`{value}`" in row for value in matcher.value.split("|"))


def test_what_is_no_promql_is_refused() -> None:
    """The parser can say no."""
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        promql.parse("sum(rate(headstock_requests_total[5m])")


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_is_wrong_and_what_to_look_at(name: str) -> None:
    """Somebody reads it at night; and the docs list it."""
    rule = ALERTS[name]

    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert f"| `{name}` |" in DOCS


def test_panels_do_not_cover_each_other() -> None:
    """Two beside each other in each row of 24 columns."""
    places = [tuple(panel["gridPos"][axis] for axis in "xywh") for panel in DASHBOARD["panels"]]
    covered = [
        (column, row)
        for x, y, width, height in places
        for column in range(x, x + width)
        for row in range(y, y + height)
    ]

    assert len(covered) == len(set(covered))
    assert max(column for column, _ in covered) < 24
