"""Arrival times to scale by: a real trace and five made-up shapes, each from a seed.

All are stretched or squeezed in time so that their busiest half minute needs eight replicas.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from jaxtyping import Float

Times = Float[np.ndarray, " requests"]

PEAK_WINDOW_S = 30.0
DURATION_S = 1800.0
REAL_FILE = "data/trace_conv/AzureLLMInferenceTrace_conv.csv"


@cache
def real_trace() -> Times | None:
    """Seconds from the first request of Azure's public conversation trace (2023, CC BY 4.0).

    Returns:
        Nothing where the folder of shared data, or this file of it, is absent.
    """
    shared = os.environ.get("HEADSTOCK_SHARED", Path(__file__).parents[2] / "shared")
    file = Path(shared) / REAL_FILE
    if not file.exists():
        return None
    with file.open(newline="") as lines:
        stamps = [row["TIMESTAMP"].replace(" ", "T") for row in csv.DictReader(lines)]
    times = np.array(stamps, dtype="datetime64[ns]")
    return (times - times[0]) / np.timedelta64(1, "s")


def real(chance: np.random.Generator, peak_rate: float) -> Times:
    """The real trace from another point on, with a tenth of its requests left out by chance."""
    times = real_trace()
    assert times is not None
    times = times[chance.random(len(times)) < 0.9]
    turned = np.sort((times - chance.choice(times)) % times[-1])
    squeeze = 1.0
    for _ in range(20):  # the window that is busiest afterwards is as much longer before
        squeeze = peak_rate / _busiest(turned, PEAK_WINDOW_S * squeeze)
    return turned / squeeze


def diurnal(chance: np.random.Generator, peak_rate: float) -> Times:
    """Two days of half an hour each: night has an eighth of the load at noon."""
    phase = chance.uniform(0, 2 * np.pi)

    def rate(at_s: Times) -> Times:
        wave = (1 + np.sin(2 * np.pi * at_s / DURATION_S + phase)) / 2
        return peak_rate * (1 / 8 + 7 / 8 * wave)

    return _poisson(chance, rate, peak_rate, 2 * DURATION_S)


def step(chance: np.random.Generator, peak_rate: float) -> Times:
    """A quarter, half or all of the load; another level every 300 s."""
    levels = chance.permutation([0.25, 0.25, 0.5, 0.5, 1.0, 1.0])

    def rate(at_s: Times) -> Times:
        return peak_rate * levels[(at_s // 300).astype(int)]

    return _poisson(chance, rate, peak_rate, DURATION_S)


def flash(chance: np.random.Generator, peak_rate: float) -> Times:
    """A quarter of the load, and three crowds that come within 20 s and stay for 100 s."""
    begins_s = np.arange(3) * DURATION_S / 3 + chance.uniform(60, DURATION_S / 3 - 160, 3)

    def rate(at_s: Times) -> Times:
        since_s = at_s[:, None] - begins_s
        crowd = np.clip(np.minimum(since_s / 20, (120 - since_s) / 20), 0, 1).max(axis=1)
        return peak_rate * (0.25 + 0.75 * crowd)

    return _poisson(chance, rate, peak_rate, DURATION_S)


def bursty(variation: float) -> Callable[[np.random.Generator, float], Times]:
    """Gamma times between requests with this coefficient of variation, at a steady mean."""

    def times(chance: np.random.Generator, peak_rate: float) -> Times:
        mean_rate = 0.6 * peak_rate
        shape = 1 / variation**2
        num = int(2 * mean_rate * DURATION_S) + 1000
        gaps_s = chance.gamma(shape, 1 / (mean_rate * shape), num)
        at_s = np.cumsum(gaps_s)
        return at_s[at_s < DURATION_S]

    return times


TRACES: dict[str, Callable[[np.random.Generator, float], Times]] = {
    "real": real,
    "diurnal": diurnal,
    "step": step,
    "flash": flash,
    "cv1": bursty(1),
    "cv4": bursty(4),
    "cv8": bursty(8),
}


def _poisson(
    chance: np.random.Generator,
    rate: Callable[[Times], Times],
    peak_rate: float,
    duration_s: float,
) -> Times:
    """Poisson arrivals of a rate that changes, by thinning (Lewis and Shedler 1979)."""
    num = chance.poisson(peak_rate * duration_s)
    at_s = np.sort(chance.uniform(0, duration_s, num))
    return at_s[chance.random(num) < rate(at_s) / peak_rate]


def _busiest(times: Times, window_s: float) -> float:
    """The highest rate over any window of this length that begins with a request."""
    ends = np.searchsorted(times, times + window_s)
    return float((ends - np.arange(len(times))).max() / window_s)
