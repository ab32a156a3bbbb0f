"""How much faster one graph is than another, on this machine and on one thread."""

import time

import numpy as np
import onnxruntime
from jaxtyping import UInt8

from export.parity import open_session
from models.evaluate import Estimate

NUM_ROUNDS = 9
ROUND_S = 0.03  # long beside the clock and the scheduler, short beside a person's patience
NUM_RESAMPLES = 2000


def speedup(
    slow: bytes,
    fast: bytes,
    picture: UInt8[np.ndarray, "1 height width 3"],
    *,
    num_rounds: int = NUM_ROUNDS,
) -> Estimate:
    """Time of the first graph by time of the second, one picture at a time.

    Rounds alternate, so that what else the machine does meets both; each round gives a ratio, and
    the median of these is the value, with a bootstrap interval.
    """
    sessions = [open_session(graph) for graph in (slow, fast)]
    num_runs = [_runs_of(session, picture) for session in sessions]
    ratios: list[float] = []
    for number in range(num_rounds):
        seconds = [0.0, 0.0]
        # Who is first changes, because a clock that drifts favours one of them.
        for place in (0, 1) if number % 2 else (1, 0):
            seconds[place] = _seconds(sessions[place], picture, num_runs[place])
        ratios.append(seconds[0] / seconds[1])
    drawn = np.random.default_rng(0).choice(ratios, (NUM_RESAMPLES, num_rounds))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Estimate(float(np.median(ratios)), float(low), float(high), num_rounds)


def _runs_of(session: onnxruntime.InferenceSession, picture: np.ndarray) -> int:
    """As many runs as fill a round; the first few allocate and are not counted."""
    _seconds(session, picture, 2)
    return max(1, round(ROUND_S / _seconds(session, picture, 2)))


def _seconds(session: onnxruntime.InferenceSession, picture: np.ndarray, num_runs: int) -> float:
    """Seconds of one run, on average."""
    began_s = time.perf_counter()
    for _ in range(num_runs):
        session.run(["features"], {"images": picture})
    return (time.perf_counter() - began_s) / num_runs
