"""How many compared pictures does it take to find a candidate worse, or good?

Simulated rollouts with the default rules, judged after every compared picture as the conductor
judges them, with rates that are known. A candidate at the edge of a rule shows the false alarms.
"""

from __future__ import annotations

import numpy as np

from benchmarks.report import Figure, arguments, finish, note
from serve.rollout import Trial, judge
from serve.task_settings import DEFAULTS

PERFECT = {"failed": 0.0, "disagreed": 0.02, "slower": 0.02, "less_confident": 0.02}
WORSE = {
    "disagrees on 25 %": {"disagreed": 0.25},
    "disagrees on 30 %": {"disagreed": 0.3},
    "disagrees on 40 %": {"disagreed": 0.4},
    "3 % failures": {"failed": 0.03},
    "10 % failures": {"failed": 0.1},
    "80 % over the limit of time": {"slower": 0.8},
    "much less confident on 45 %": {"less_confident": 0.45},
}
EDGE = {
    "disagrees on 20 %, the limit": {"disagreed": 0.2},
    "1 % failures, the limit": {"failed": 0.01},
}
GOOD = {"disagrees on 2 %": {"disagreed": 0.02}, "disagrees on 10 %": {"disagreed": 0.1}}
MOST = 5000


def main() -> None:
    """Simulate each candidate many times."""
    chosen = arguments(__doc__ or "")
    num_runs = 40 if chosen.quick else 200
    chance = np.random.default_rng(0)
    figures: list[Figure] = []
    for verdict, candidates in (("worse", WORSE), ("good", GOOD)):
        for name, rates in candidates.items():
            lengths = [_length(chance, {**PERFECT, **rates}, verdict) for _ in range(num_runs)]
            low, median, high = np.quantile(lengths, [0.05, 0.5, 0.95], method="higher")
            figures.append(Figure(f"{name}: {verdict} after", median, low, high, "pictures"))
            note(f"{name}: {median:.0f} pictures")
    for name, rates in EDGE.items():
        lengths = [_length(chance, {**PERFECT, **rates}, "worse") for _ in range(num_runs)]
        alarms = float(np.mean(np.array(lengths) < MOST))
        figures.append(
            Figure(f"{name}: ever called worse", alarms, alarms, alarms, "share", "<= 0.01")
        )
    finish("rollout_power", figures, chosen)


def _length(chance: np.random.Generator, rates: dict[str, float], verdict: str) -> int:
    """Compared pictures until the verdict, or `MOST` if it does not come."""
    counts = {name: np.cumsum(chance.random(MOST) < rate) for name, rate in rates.items()}
    # After every one at first, then after every hundredth of what there is.
    place = DEFAULTS.min_compared
    while place < MOST:
        trial = Trial(compared=place, **{n: int(c[place - 1]) for n, c in counts.items()})
        judgement = judge(trial, DEFAULTS)
        if judgement.verdict == verdict:
            return place
        place += max(1, place // 100)
    return MOST


if __name__ == "__main__":
    main()
