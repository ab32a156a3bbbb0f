"""How many replicas: a pure function of what was observed, and of what a start and a batch take.

From the rows that arrived follows the capacity that would have answered them in time, from its
growth what will be asked for once a new replica answers, and from the largest of a while back what
is kept. Nothing else is remembered, so the same observations always give the same decision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

BIN_S = 0.5  # arrivals are counted in bins of this length
STALE_S = 6.0  # three reports of a replica that are missing
MISSED_SHARE = 0.001  # of rows that may be later than the deadline
# Longer stretches of arrivals are no burst; their rate says all.
LONGEST_BURST_S = 60.0
# Two windows are compared for a trend: long enough to have some hundred rows, and not much longer
# than a start, as what came before that says little of what comes within one.
SHORTEST_TREND_S, LONGEST_TREND_S = 30.0, 60.0
# The stabilisation window of Kubernetes' autoscaler, which is the field's habit.
HOLD_S = 300.0
# A demand that wavers around whole replicas starts and stops none: a replica goes when a quarter of
# another is left over.
SURPLUS = 0.25
JUMP_S = 2.0  # as often as replicas report
# At a steady load chance does it once in several hours; 3.5 deviations were passed once an hour.
JUMP_DEVIATIONS = 4.5


class ServiceTime(BaseModel, frozen=True, extra="forbid"):
    """Time of a batch on one replica, as measured when it starts: `fixed_s + rows * row_s`.

    Args:
        batch: Most rows in a batch.
    """

    fixed_s: NonNegativeFloat
    row_s: PositiveFloat
    batch: PositiveInt

    @property
    def full_s(self) -> float:
        """Time of a full batch."""
        return self.fixed_s + self.row_s * self.batch

    @property
    def rate(self) -> float:
        """Rows a second of a replica that never waits."""
        return self.batch / self.full_s


class Aim(BaseModel, frozen=True, extra="forbid"):
    """What is asked of the fleet, and within which bounds.

    Args:
        deadline_s: From a row's arrival to its answer.
        startup_s: From asking for a replica to its first answer.
        max_replicas_per_node: Replicas that share a node, by its cores or parts of GPUs.
        spare: Replicas beyond what the demand asks for; derived where none is given.
        hold_s: How long capacity that was needed is kept; derived where none is given.
    """

    deadline_s: PositiveFloat
    startup_s: PositiveFloat
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt
    max_replicas_per_node: PositiveInt | None = None
    spare: float | None = None
    hold_s: PositiveFloat | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Aim:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas is {self.min_replicas}, more than max_replicas, {self.max_replicas}"
            )
        return self


@dataclass(frozen=True)
class Observed:
    """What is known of the fleet.

    Args:
        arrived: Rows that arrived in each bin, oldest first.
        age_s: Since the last of these bins ended.
        queued: Rows that wait now.
        replicas: Those that answer, start, or were asked for.
        nodes: Nodes that replicas can run on.
        unheard: Replicas that answer and have not reported yet.
    """

    arrived: NDArray[np.float64]
    age_s: float
    queued: int
    replicas: int
    nodes: int = 1
    unheard: int = 0


@dataclass(frozen=True)
class Decision:
    """How many replicas, by which rule, and what it was decided from.

    Args:
        rate: Rows a second that arrived lately.
        demand: Rows a second that the fleet must be able to answer.
        needed: Replicas for that demand, before rules and bounds.
        replica_rate: Rows a second of one replica.
        startup_s: What a start was taken to take.
    """

    replicas: int
    rule: str
    rate: float
    demand: float
    needed: int
    queued: int
    before: int
    age_s: float
    replica_rate: float
    startup_s: float

    def __str__(self) -> str:
        return (
            f"{self.before} -> {self.replicas} replicas by rule {self.rule}: "
            f"{self.rate:.1f} rows/s came, capacity for {self.demand:.1f} rows/s is needed "
            f"({self.needed} replicas of {self.replica_rate:.1f} rows/s), {self.queued} rows wait, "
            f"observed {self.age_s:.1f} s ago"
        )


def decide(observed: Observed, service: ServiceTime, aim: Aim) -> Decision:
    """How many replicas there should be, from what arrived; see `choose`."""
    kept = _kept_bins(aim) + 2 * _trend_bins(aim) + round(LONGEST_BURST_S / BIN_S)
    demand = forecast(observed.arrived[-kept:], service, aim)
    return choose(observed, demand, service, aim)


def choose(
    observed: Observed, demand: NDArray[np.float64], service: ServiceTime, aim: Aim
) -> Decision:
    """How many replicas there should be.

    Rules, the first that applies: `unknown` (no metrics: nothing changes), `stale` (old metrics, or
    none yet of a replica: nothing is let go), `wake` (rows wait and nobody is there), `queue` (what
    waits needs more than what comes), `rise` (more comes), `young` (too little was seen to let go),
    `fall`, `steady`; `limit` where a bound has the last word.

    Args:
        demand: Of `forecast`, up to the last bin observed.
    """
    lately = observed.arrived[-round(SHORTEST_TREND_S / BIN_S) :]
    rate = float(lately.mean()) / BIN_S if len(lately) else 0.0
    highest = float(demand[-_kept_bins(aim) :].max()) if len(demand) else 0.0
    # What waits beyond what the deadline allows has to go while new replicas start, or later
    # arrivals wait behind it.
    late_rows = observed.queued - observed.replicas * service.rate * _slack_s(service, aim)
    backlog = max(0.0, late_rows) / max(aim.startup_s, aim.deadline_s)
    for_demand = _replicas_for(highest, service, aim)
    needed = _replicas_for(highest + backlog, service, aim)
    before = observed.replicas
    wanted, rule = needed, "steady"
    if not len(observed.arrived):
        wanted, rule = before, "unknown"
    elif observed.age_s > STALE_S or observed.unheard:
        wanted, rule = max(needed, before), "stale"
    elif needed > before:
        rule = "queue" if for_demand <= before else "rise"
    elif needed < before:
        is_young = len(observed.arrived) < _kept_bins(aim)
        kept = before if is_young else _replicas_for(highest + backlog, service, aim, SURPLUS)
        wanted = min(before, kept)
        rule = "young" if is_young else "fall" if wanted < before else "steady"
    if before == 0 and not observed.queued:
        # Nothing can arrive unseen where nobody answers; what was forecast before is no reason.
        wanted, rule = 0, "steady"
    elif wanted == 0 and observed.queued:
        wanted, rule = 1, "wake"
    most = aim.max_replicas
    if aim.max_replicas_per_node is not None:
        most = min(most, observed.nodes * aim.max_replicas_per_node)
    # The upper bound last: where there is no room, the lower one cannot make any.
    bounded = min(max(wanted, aim.min_replicas), most)
    return Decision(
        replicas=bounded,
        rule=rule if bounded == wanted else "limit",
        rate=rate,
        demand=highest + backlog,
        needed=needed,
        queued=observed.queued,
        before=before,
        age_s=observed.age_s,
        replica_rate=service.rate,
        startup_s=aim.startup_s,
    )


def forecast(arrived: NDArray[np.float64], service: ServiceTime, aim: Aim) -> NDArray[np.float64]:
    """Rows a second to be ready for, as seen at each bin: bursts and jumps as they are, and growth.

    A bin's forecast looks at no later one, so a longer record only adds to a shorter one.
    """
    needs = burst_rates(arrived, _slack_s(service, aim))
    return np.maximum(needs, _jumps(arrived)) + _growth(arrived, _trend_bins(aim), aim.startup_s)


def _replicas_for(demand: float, service: ServiceTime, aim: Aim, surplus: float = 0.0) -> int:
    """Replicas for a demand, and some to spare.

    Derived, what is to spare lets a row miss its deadline by chance as rarely as may be: where rows
    come at Poisson times, those that wait longer than t are exp(-2 x spare rate x t) of all.

    Source: the heavy-traffic bound of a queue's wait (Kingman 1962), for a service time that is the
    same for all rows.
    """
    if demand == 0:
        return 0
    spare = aim.spare
    if spare is None:
        slack_s = max(_slack_s(service, aim), service.row_s)
        spare = -math.log(MISSED_SHARE) / (2 * slack_s) / service.rate
    # Rounding must not ask for one more.
    return max(1, math.ceil(demand / service.rate + spare + surplus - 1e-9))


def _kept_bins(aim: Aim) -> int:
    """How long capacity that was needed is kept.

    Not shorter than a start: a replica that is let go and needed again within that time costs more
    than one that idles meanwhile, and comes too late (the ski-rental rule).
    """
    return math.ceil((aim.hold_s or max(aim.startup_s, HOLD_S)) / BIN_S)


def _trend_bins(aim: Aim) -> int:
    return round(min(max(aim.startup_s, SHORTEST_TREND_S), LONGEST_TREND_S) / BIN_S)


def _slack_s(service: ServiceTime, aim: Aim) -> float:
    """How long a row may wait for its batch; a deadline below a batch's time leaves nothing."""
    return max(aim.deadline_s - service.full_s, 0.0)


def burst_rates(arrived: NDArray[np.float64], slack_s: float) -> NDArray[np.float64]:
    """The capacity, in rows a second, that just answers in time what arrived up to each bin.

    Rows that come within a time t are answered in time if they can be served in t and the time that
    the last of them may wait; of all t, the one counts that asks for most.

    Source: the arrival curve and delay bound of network calculus (Le Boudec and Thiran 2001, 1.4).
    """
    total = np.concatenate([[0.0], np.cumsum(arrived)])
    rates = np.zeros(len(arrived))
    length = 1
    while length <= min(len(arrived), round(LONGEST_BURST_S / BIN_S)):
        within = (total[length:] - total[:-length]) / (length * BIN_S + slack_s)
        np.maximum(rates[length - 1 :], within, out=rates[length - 1 :])
        # Half as much again each time: the bursts between are in the spare capacity.
        length = max(length + 1, length * 3 // 2)
    return rates


def _jumps(arrived: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rate of the last moment where chance does not explain it: a crowd that may stay.

    A burst alone asks for less than its rate, as it may wait; a crowd does not end.
    """
    bins, before = round(JUMP_S / BIN_S), round(SHORTEST_TREND_S / BIN_S)
    recent = _sums(arrived, bins)
    mean = _sums(arrived, before) / before * bins
    squares = _sums(recent**2, 2 * before) / (2 * before)
    usual = _sums(recent, 2 * before) / (2 * before)
    # Traffic that always comes in bursts varies by more than Poisson's arrivals.
    spread = np.maximum((squares - usual**2) / np.maximum(usual, 1.0), 1.0)
    is_jump = recent > mean + JUMP_DEVIATIONS * np.sqrt(spread * (mean + 1))
    is_jump[:before] = False  # the windows are not full yet
    return np.where(is_jump, recent / JUMP_S, 0.0)


def _growth(arrived: NDArray[np.float64], trend: int, startup_s: float) -> NDArray[np.float64]:
    """Rows a second that come on top while a replica starts, if the rate grows as it did.

    One standard deviation of the difference between two counts is taken for chance.
    """
    now = _sums(arrived, trend)
    past = np.concatenate([np.zeros(trend), now])[: len(now)]
    more = np.maximum(now - past - np.sqrt(now + past), 0.0)
    more[: 2 * trend] = 0.0  # the windows are not full yet
    return more / (trend * BIN_S) ** 2 * startup_s


def _sums(counts: NDArray[np.float64], bins: int) -> NDArray[np.float64]:
    """The rows of the last so many bins, at each bin."""
    total = np.concatenate([np.zeros(bins + 1), np.cumsum(counts)])
    return total[bins + 1 :] - total[1:-bins]
