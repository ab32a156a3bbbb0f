"""What Ray's controller tells, and what becomes of it: real contexts, and a clock of the test's."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from serve.autoscale import BIN_S, STALE_S, Decision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of pydantic
    from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

    from serve import scaling
    from serve.scaling import FIRST_START_S, LONGEST_START_S, Arrivals, Scaling, Starts

DEPLOYMENT = DeploymentID("predictor", "headstock")
REPORT_S = 1.0
KWARGS: dict[str, Any] = {
    "deadline_s": 2.0,
    "max_queued": 512,
    "keep_s": 20.0,
    "conductor": ["conductor", "headstock"],
}


def replica_id(name: str) -> ReplicaID:
    """A replica of the service."""
    return ReplicaID(name, DEPLOYMENT)


class Controller:
    """Ray's part: asks every tenth of a second, runs what is wanted, passes on what is reported.

    Each replica takes rows at its rate and reports once a second, on a clock of its own.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        policy: Scaling | None = None,
        least: int = 1,
        most: int = 8,
        start_s: float = 3.0,
        row_s: float = 0.1,
    ) -> None:
        self.now_s, self.start_s, self.row_s = 1000.0, start_s, row_s
        self.least, self.most, self.target = least, most, max(1, least)
        self.starting: list[tuple[float, str]] = []
        self.running: list[str] = []
        self.points: dict[str, list[dict[str, float]]] = {}
        self.reports: dict[str, list[dict[str, float]]] = {}
        self.silent: set[str] = set()
        self.row_s_of: dict[str, float] = {}  # those that say otherwise
        self.num_started = 0
        self.waiting = 0.0
        self.told: list[Decision] = []
        self.policy = policy or Scaling(**KWARGS)
        self.asked = _apply_autoscaling_config(self.policy)
        self.has_conductor = True
        monkeypatch.setattr(scaling, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(scaling, "ray", SimpleNamespace(get_actor=self._conductor))

    def run(self, seconds: float, *, rate: float = 0.0) -> None:
        """Let so much time pass, with so many rows a second over all replicas."""
        for _ in range(round(seconds * 10)):
            self.now_s += 0.1
            self._start_and_stop()
            self._take(rate * 0.1)
            state = self.asked(self.context())
            self.target = min(max(state[0], self.least), self.most)

    def context(self) -> AutoscalingContext:
        """What Ray hands to a policy."""
        raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
        for name, points in self.reports.items():
            if name in self.running:
                for point in points:
                    for metric in ("arrived", "waiting", "row_s", "batch"):
                        series = raw.setdefault(metric, {}).setdefault(replica_id(name), [])
                        series.append(TimeStampedValue(point["at"], point[metric]))
        return AutoscalingContext(
            deployment_id=DEPLOYMENT,
            deployment_name=DEPLOYMENT.name,
            app_name=DEPLOYMENT.app_name,
            current_num_replicas=len(self.running),
            target_num_replicas=self.target,
            running_replicas=[replica_id(name) for name in self.running],
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics=lambda: raw,
            capacity_adjusted_min_replicas=self.least,
            capacity_adjusted_max_replicas=self.most,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now_s,
            config=AutoscalingConfig(
                min_replicas=self.least,
                max_replicas=max(1, self.most),
                upscale_delay_s=0,
                downscale_delay_s=0,
            ),
        )

    def _conductor(self, name: str, *, namespace: str) -> object:
        if (name, namespace) != ("conductor", "headstock") or not self.has_conductor:
            raise ValueError("no actor of that name")
        return SimpleNamespace(scaled=SimpleNamespace(remote=self.told.append))

    def _start_and_stop(self) -> None:
        while len(self.running) + len(self.starting) < self.target:
            self.num_started += 1
            self.starting.append((self.now_s + self.start_s, f"r{self.num_started}"))
        while len(self.running) + len(self.starting) > self.target:
            self.running.remove(self.running[-1])
        for ready_s, name in list(self.starting):
            if ready_s <= self.now_s:
                self.starting.remove((ready_s, name))
                self.running.append(name)
                self.points[name] = [self._point(name, 0.0)]

    def _take(self, rows: float) -> None:
        for name in self.running:
            last = self.points[name][-1]
            total = last["arrived"] + rows / len(self.running)
            self.points[name].append(self._point(name, total))
            self.points[name] = self.points[name][-25:]
            if name not in self.silent and round(self.now_s * 10) % 10 == 0:
                self.reports[name] = self.points[name][::5]

    def _point(self, name: str, arrived: float) -> dict[str, float]:
        skewed_s = self.now_s + 3600.0 * int(name[1:])
        return {
            "at": skewed_s,
            "arrived": arrived,
            "waiting": self.waiting,
            "row_s": self.row_s_of.get(name, self.row_s),
            "batch": 1.0,
        }


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self._lines = lines

    @override
    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self._lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What goes to the log of Ray's controller."""
    lines: list[str] = []
    handler = Lines(lines)
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_replicas_follow_the_load_up_and_down_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica does 10 rows/s: 35 rows/s need four, and the clocks of replicas may be wrong."""
    ray = Controller(monkeypatch)
    ray.run(30.0, rate=5.0)
    before = ray.target
    ray.run(30.0, rate=35.0)
    busy = ray.target
    ray.run(120.0, rate=5.0)

    assert (before, busy, ray.target) == (1, 4, 1)


def test_rows_are_counted_once_whoever_reports_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate in a decision is what came, at any number of replicas."""
    ray = Controller(monkeypatch, least=3)
    ray.run(60.0, rate=12.0)

    assert ray.told[-1].rate == pytest.approx(12.0, rel=0.05)


def test_a_new_controller_takes_what_was_counted_before_for_no_news(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray starts another when one dies; the replicas count on."""
    ray = Controller(monkeypatch, least=2)
    ray.run(600.0, rate=4.0)
    ray.asked = _apply_autoscaling_config(Scaling(**KWARGS))
    ray.told.clear()
    ray.run(60.0, rate=4.0)

    assert max(decision.replicas for decision in ray.told) == 2
    assert max(decision.rate for decision in ray.told) < 5.0


def test_a_silent_replica_lets_none_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its load may still be there; when it is heard again, what is not needed goes."""
    ray = Controller(monkeypatch)
    ray.run(60.0, rate=35.0)
    ray.silent = {ray.running[0]}
    ray.run(120.0)
    silent = ray.target, ray.told[-1].rule
    ray.silent.clear()
    ray.run(60.0)

    assert silent == (4, "stale")
    assert ray.target == 1


def test_what_others_count_is_seen_beside_a_silent_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growth does not wait until the silent one is heard of or gone."""
    ray = Controller(monkeypatch, least=2)
    ray.run(60.0, rate=5.0)
    ray.silent = {ray.running[0]}
    ray.run(30.0, rate=60.0)  # of which half is seen

    assert ray.target >= 4


def test_a_replica_that_never_reports_lets_none_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its method may fail; Ray then passes on nothing of it."""
    ray = Controller(monkeypatch)
    ray.silent = {f"r{num}" for num in range(2, 9)}
    ray.run(60.0, rate=35.0)
    grown = ray.target
    ray.run(120.0)

    assert grown > 1
    assert (ray.target, ray.told[-1].rule) == (grown, "stale")


def test_a_replica_that_has_just_started_does_not_say_what_a_row_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It knows the trunk's time, and nothing of pictures that take long to decode."""
    ray = Controller(monkeypatch)
    ray.run(40.0, rate=8.0)
    ray.row_s_of = {"r2": 0.001}
    ray.run(5.0, rate=18.0)
    asked = ray.target
    ray.run(5.0, rate=2.0)

    assert asked == ray.target == len(ray.running) == 2
    assert ray.told[-1].replica_rate == pytest.approx(10.0)


def test_rows_that_are_quicker_for_a_moment_let_no_replica_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a row takes is measured on some of them; slower ones count at once."""
    ray = Controller(monkeypatch)
    ray.run(60.0, rate=18.0)
    before = ray.target
    ray.row_s = 0.02
    ray.run(15.0, rate=18.0)
    quicker = ray.target
    ray.run(30.0, rate=18.0)
    long_after = ray.target
    ray.row_s = 0.2
    ray.run(5.0, rate=18.0)

    assert (before, quicker, long_after) == (2, 2, 1)
    assert ray.target >= 4


def test_the_start_of_a_replica_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """From asking for it until Ray calls it running."""
    ray = Controller(monkeypatch, start_s=7.0)
    ray.run(1.0)
    first = ray.told[-1].startup_s
    ray.run(10.0)

    assert first == FIRST_START_S
    assert ray.told[-1].startup_s == pytest.approx(7.0, abs=0.2)


def test_a_start_that_waits_for_room_says_nothing_of_the_next() -> None:
    """As where no node is free for hours."""
    starts = Starts()
    starts.see(1, 0, 0.0)
    starts.see(1, 1, 5.0)
    starts.see(2, 1, 10.0)
    starts.see(2, 2, 11.0 + LONGEST_START_S)

    assert starts.seconds == 5.0


def test_the_bounds_are_those_that_ray_names_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade scales them; one that says none may run is Ray's to keep."""
    ray = Controller(monkeypatch, most=2)
    ray.run(60.0, rate=50.0)
    decision = ray.told[-1]
    ray.most, ray.least = 0, 0
    ray.run(5.0, rate=50.0)

    assert (decision.replicas, decision.rule) == (2, "limit")
    assert ray.target == 0


def test_a_change_is_one_line_that_says_all_and_no_change_is_none(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """JSON, where Ray's controller says that it starts replicas."""
    ray = Controller(monkeypatch)
    ray.run(20.0, rate=5.0)
    quiet = len(said)
    ray.run(10.0, rate=35.0)
    lines = [line.removeprefix("headstock scaling ") for line in said]
    changes = [decision for decision in ray.told if decision.replicas != decision.before]

    assert quiet == 0
    assert [Decision(**json.loads(line)) for line in lines] == changes
    assert len(changes) >= 1


def test_an_error_changes_nothing(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """It would end the round in which Ray looks after its replicas."""
    ray = Controller(monkeypatch, least=2)
    ray.run(10.0)

    def fail(*_: object) -> Decision:
        raise ZeroDivisionError

    monkeypatch.setattr(scaling, "decide", fail)
    ray.run(10.0)

    assert ray.target == 2
    assert "nothing changes" in said[-1]


def test_a_conductor_that_is_away_keeps_nobody_from_scaling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told again when it is back."""
    ray = Controller(monkeypatch)
    ray.has_conductor = False
    ray.run(30.0, rate=35.0)
    alone = ray.target, len(ray.told)
    ray.has_conductor = True
    ray.run(1.0, rate=35.0)

    assert alone == (4, 0)
    assert ray.told


def points(*values: float, end_s: float) -> list[TimeStampedValue]:
    """A count at every half second up to a time."""
    times = [end_s - BIN_S * place for place in range(len(values))][::-1]
    return [TimeStampedValue(at, value) for at, value in zip(times, values, strict=True)]


@pytest.mark.parametrize("is_older", [False, True])
def test_the_first_report_of_a_replica_counts_unless_it_is_older(*, is_older: bool) -> None:
    """What a new one counted came since somebody looked."""
    replica = replica_id("r1")
    arrivals = Arrivals()
    reports = {replica: points(100.0, 102.0, 104.0, end_s=50.0)}
    arrivals.hear(reports, 10.0, older=frozenset([replica]) if is_older else frozenset())
    arrived, age_s = arrivals.of([replica], 12.0)

    # The newest bin is not over yet.
    assert arrived.sum() == (2.0 if is_older else 102.0)
    assert age_s == 2.0


def sum_of(arrivals: Arrivals, replica: ReplicaID, now_s: float) -> float:
    """All rows in complete bins."""
    return float(arrivals.of([replica], now_s)[0].sum())


def test_a_report_that_comes_again_or_late_adds_nothing_twice() -> None:
    """Counts are differences to what was counted."""
    replica = replica_id("r1")
    arrivals = Arrivals()

    def hear(report: list[TimeStampedValue], now_s: float) -> None:
        arrivals.hear({replica: report}, now_s, older=frozenset())

    hear(points(0.0, 1.0, 2.0, end_s=50.0), 10.0)
    hear(points(0.0, 1.0, 2.0, end_s=50.0), 10.5)
    hear(points(1.0, 2.0, 5.0, 9.0, end_s=51.0), 11.0)
    hear(points(9.0, 9.0, end_s=55.0), 15.0)  # the reports between were lost

    assert sum_of(arrivals, replica, 15.0) == 9.0


def test_bins_of_the_past_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service runs for months."""
    monkeypatch.setattr(scaling, "MOST_BINS", 100)
    replica = replica_id("r1")
    arrivals = Arrivals()
    for second in range(500):
        report = points(2.0 * second, 2.0 * second + 1, end_s=float(second))
        arrivals.hear({replica: report}, float(second), older=frozenset())
        arrived, age_s = arrivals.of([replica], float(second))

    assert len(arrived) <= 103
    assert age_s == 0.0 < STALE_S
    np.testing.assert_allclose(arrived[-90:-2], 1.0)
