"""What do replicas cost that a policy starts and stops, if 99.9 % of answers must be in time?

The policy of `serve/autoscale.py` against Knative's and Ray Serve's own, in simulation: a real
trace and six made-up ones, replicas that take 2, 30 or 120 s to start, five seeds. Every policy is
tuned for each kind of trace and start on other seeds: the cheapest of its settings that keeps the
deadline on all of them. The cost is replica-seconds, starts included, after the first two minutes;
what a plan costs that knows the future is beside it.

A replica here is one of a large trunk asked of albums: a batch of one takes 0.5 s, of four 1.25 s,
and an answer has to be there within 3 s.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.autoscale_baselines import clairvoyant_plans, knative_settings, ray_settings
from benchmarks.autoscale_traces import TRACES, real_trace
from benchmarks.autoscale_world import TICK_S, Policy, Seen, World, simulate
from benchmarks.report import Figure, arguments, finish, note
from serve.autoscale import Aim, Observed, ServiceTime, choose, forecast

SERVICE = ServiceTime(fixed_s=0.25, row_s=0.25, batch=4)
DEADLINE_S = 3.0
IN_TIME = 0.999
PEAK_REPLICAS = 8
MAX_REPLICAS = 16
STARTUPS_S = (2.0, 30.0, 120.0)
WARM_UP_S = 120.0  # a start of the slowest kind; all policies begin with the most replicas
SEEDS = range(5)
TUNING_SEEDS = range(100, 103)
SPARES = (-1.5, 0.0, 0.4, 0.8, 1.6, 6.0)
HOLDS_S = (10.0, 60.0, 240.0, 900.0)
POLICIES = ("ours", "knative", "ray")
UNTUNED = "nothing tuned"

Candidate = tuple[str, Callable[[Sequence[float], World], Policy]]


@dataclass(frozen=True)
class Score:
    """What one policy did in one cell.

    Args:
        replicas: Mean number of replicas that were paid for.
        in_time: Share of the requests that were answered within the deadline.
    """

    setting: str
    replicas: float
    in_time: float

    @property
    def holds(self) -> bool:
        """Whether the deadline was kept for as many as have to be in time."""
        return self.in_time >= IN_TIME


@dataclass(frozen=True)
class Cell:
    """One trace, start-up delay and seed; `plan` is missing where no plan keeps the deadline."""

    trace: str
    startup_s: float
    seed: int
    plan: Score | None
    policies: dict[str, Score]


def main() -> None:
    """Tune and score cell by cell; a run that was stopped goes on after the last cell."""
    chosen = arguments(__doc__ or "")
    names = ("cv1", "diurnal") if chosen.quick else tuple(TRACES)
    if real_trace() is None:
        note("the shared data is not here: without the real trace")
        names = tuple(name for name in names if name != "real")
    seeds = SEEDS[:2] if chosen.quick else SEEDS
    progress = Path(tempfile.gettempdir()) / f"headstock-autoscale-{len(names)}-{len(seeds)}.jsonl"
    cells = _finished(progress)
    done = {(cell.trace, cell.startup_s, cell.seed) for cell in cells}
    for name, startup_s in product(names, STARTUPS_S):
        left = [seed for seed in seeds if (name, startup_s, seed) not in done]
        if not left:
            continue
        plans = {seed: _best_plan(name, startup_s, seed) for seed in left}
        tuned: dict[str, Candidate] = {}
        if any(plans.values()):
            tuned = {policy: _tune(policy, name, startup_s) for policy in POLICIES}
        for seed in left:
            cells.append(_cell(name, startup_s, seed, plans[seed], tuned))
            with progress.open("a") as file:
                file.write(json.dumps(asdict(cells[-1])) + "\n")
        note(
            f"{len(cells)} of {len(names) * len(STARTUPS_S) * len(seeds)} cells: {_line(cells[-1])}"
        )
    if not chosen.json:
        Console().print(_every_cell(cells))
    progress.unlink()
    finish("autoscale", _figures(cells), chosen)


def _finished(progress: Path) -> list[Cell]:
    if not progress.exists():
        return []
    cells = []
    for line in progress.read_text().splitlines():
        kept = json.loads(line)
        kept["plan"] = kept["plan"] and Score(**kept["plan"])
        kept["policies"] = {name: Score(**score) for name, score in kept["policies"].items()}
        cells.append(Cell(**kept))
    return cells


def _candidates(policy: str) -> list[Candidate]:
    """The settings that a policy is tuned over."""
    if policy == "ours":
        return [
            (f"spare {spare}, hold {hold_s:g} s", _ours(spare, hold_s))
            for spare, hold_s in product(SPARES, HOLDS_S)
        ]
    settings = knative_settings() if policy == "knative" else ray_settings()
    return [(str(setting), _fresh(setting)) for setting in settings]


def _ours(spare: float | None, hold_s: float | None) -> Callable[[Sequence[float], World], Policy]:
    def make(_arrivals_s: Sequence[float], world: World) -> Policy:
        aim = Aim(
            deadline_s=world.deadline_s,
            startup_s=world.startup_s,
            min_replicas=world.min_replicas,
            max_replicas=world.max_replicas,
            spare=spare,
            hold_s=hold_s,
        )
        return our_policy(aim, world.service)

    return make


def our_policy(aim: Aim, service: ServiceTime) -> Policy:
    """The policy, whose forecast is made once: a bin's forecast looks at no later one."""
    known = np.zeros(0)

    def policy(seen: Seen) -> int:
        nonlocal known
        if not len(known):
            known = forecast(seen.all_arrived, service, aim)
        observed = Observed(seen.arrived, age_s=0.0, queued=seen.queued, replicas=seen.asked)
        return choose(observed, known[: len(seen.arrived)], service, aim).replicas

    return policy


def _fresh(setting: Policy) -> Callable[[Sequence[float], World], Policy]:
    """A policy that remembers begins anew with every trace."""
    return lambda _arrivals_s, _world: deepcopy(setting)


def _tune(policy: str, trace: str, startup_s: float) -> Candidate:
    """The cheapest setting that keeps the deadline on all tuning seeds, else the most punctual."""
    first, *others = TUNING_SEEDS
    scored = [
        (_score(trace, startup_s, first, candidate), candidate) for candidate in _candidates(policy)
    ]
    by_cost = sorted(scored, key=lambda pair: (not pair[0].holds, pair[0].replicas))
    for score, candidate in by_cost:
        if score.holds and all(_score(trace, startup_s, seed, candidate).holds for seed in others):
            return candidate
    return max(scored, key=lambda pair: pair[0].in_time)[1]


def _cell(
    trace: str, startup_s: float, seed: int, plan: Score | None, tuned: dict[str, Candidate]
) -> Cell:
    scores: dict[str, Score] = {}
    if plan:
        candidates = {**tuned, UNTUNED: ("all derived", _ours(None, None))}
        scores = {
            name: _score(trace, startup_s, seed, candidate)
            for name, candidate in candidates.items()
        }
    return Cell(trace, startup_s, seed, plan, scores)


def _score(trace: str, startup_s: float, seed: int, candidate: Candidate) -> Score:
    arrivals_s, world = _world(trace, startup_s, seed)
    setting, make = candidate
    run = simulate(arrivals_s, make(arrivals_s, world), world)
    is_counted = np.asarray(arrivals_s) >= WARM_UP_S
    return Score(
        setting,
        replicas=float(np.mean(run.replicas[round(WARM_UP_S / TICK_S) :])),
        in_time=float(np.mean(run.latency_s[is_counted] <= DEADLINE_S)),
    )


def _best_plan(trace: str, startup_s: float, seed: int) -> Score | None:
    """The cheapest plan found that keeps the deadline: a search by halves in each family."""
    arrivals_s, world = _world(trace, startup_s, seed)
    best: Score | None = None
    for family in clairvoyant_plans(list(arrivals_s), world):
        low, high = 0.8, 2.0
        for _ in range(4):
            factor = (low + high) / 2
            score = _score(trace, startup_s, seed, ("plan", _fresh(family(factor))))
            low, high = (low, factor) if score.holds else (factor, high)
            if score.holds and (best is None or score.replicas < best.replicas):
                best = score
    return best


@lru_cache(maxsize=8)
def _world(trace: str, startup_s: float, seed: int) -> tuple[list[float], World]:
    chance = np.random.default_rng(seed)
    arrivals_s = TRACES[trace](chance, PEAK_REPLICAS * SERVICE.rate)
    world = World(
        SERVICE,
        DEADLINE_S,
        startup_s,
        min_replicas=1,
        max_replicas=MAX_REPLICAS,
        initial_replicas=MAX_REPLICAS,
    )
    return arrivals_s.tolist(), world


def _figures(cells: list[Cell]) -> list[Figure]:
    possible = [cell for cell in cells if cell.plan]
    ours = [cell for cell in possible if cell.policies["ours"].holds]
    figures = [
        _ratio("ours / Knative", _ratios(ours, "knative"), "<= 0.85"),
        _ratio("ours / Ray Serve", _ratios(ours, "ray"), "<= 0.7"),
        _largest("ours / Knative, worst cell", _ratios(ours, "knative"), "<= 1.02"),
        _largest("ours / Ray Serve, worst cell", _ratios(ours, "ray"), "<= 1.02"),
        _ratio(
            "ours / plan", [c.policies["ours"].replicas / c.plan.replicas for c in ours if c.plan]
        ),
        _count("cells that no plan found can keep", len(cells) - len(possible), len(cells)),
    ]
    for name in (*POLICIES, UNTUNED):
        missed = sum(not cell.policies[name].holds for cell in possible)
        aim = "<= 0" if name == "ours" else ""
        figures.append(_count(f"cells missed: {name}", missed, len(possible), aim))
    return figures


def _ratios(cells: Iterable[Cell], other: str) -> list[float]:
    """Cost ratios of cells in which both keep the deadline."""
    return [
        cell.policies["ours"].replicas / cell.policies[other].replicas
        for cell in cells
        if cell.policies[other].holds
    ]


def _ratio(name: str, ratios: Sequence[float], aim: str = "") -> Figure:
    """The geometric mean, with a bootstrap interval over cells."""
    if not ratios:
        return Figure(name, math.nan, math.nan, math.nan, "ratio", aim)
    logs = np.log(ratios)
    means = np.random.default_rng(0).choice(logs, (2000, len(logs))).mean(axis=1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return Figure(name, float(np.exp(logs.mean())), float(low), float(high), "ratio", aim)


def _largest(name: str, ratios: Sequence[float], aim: str) -> Figure:
    worst = max(ratios, default=math.nan)
    return Figure(name, worst, worst, worst, "ratio", aim)


def _count(name: str, count: int, num_all: int, aim: str = "") -> Figure:
    return Figure(name, count, count, count, f"of {num_all}", aim)


def _every_cell(cells: Iterable[Cell]) -> Table:
    names = (*POLICIES, UNTUNED)
    table = Table("trace", "start", "seed", "plan", *names, title="replicas")
    table.caption = "mean replicas paid for; in brackets the share in time where it is below 99.9 %"
    for cell in cells:
        table.add_row(
            cell.trace,
            f"{cell.startup_s:g} s",
            str(cell.seed),
            _shown(cell.plan),
            *(_shown(cell.policies.get(name)) for name in names),
        )
    return table


def _shown(score: Score | None) -> str:
    if score is None:
        return "none"
    late = "" if score.holds else f" ({100 * score.in_time:.2f} %)"
    return f"{score.replicas:.2f}{late}"


def _line(cell: Cell) -> str:
    scores = ", ".join(
        f"{name} {_shown(score)} [{score.setting}]" for name, score in cell.policies.items()
    )
    return f"{cell.trace}, start {cell.startup_s:g} s: plan {_shown(cell.plan)}, {scores}"


if __name__ == "__main__":
    main()
