"""What is still answered in time when three times as many ask as can be answered?

Requests that allow half a second come at Poisson times: as many a second as the service was just
measured to answer with all its connections busy, and three times as many. Goodput is what was
answered within that half second, by the client's clock and from when the request was due; a caller
hangs up after twice that. A service that takes all that comes answers everything too late under the
latter.

A trunk of a usual size says whether refusing costs more than it saves; MobileNetV3-small, whose run
takes no longer than the rest of a request, shows where that ends.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.fixtures import make_bundle, make_trunk, photograph, serving
from benchmarks.load import Load, run_load
from benchmarks.open_load import run_open_load
from benchmarks.report import Figure, arguments, finish, median_of, note
from serve.client import Client

LIMIT_S = 0.5
OVERLOAD = 3
CONNECTIONS = 8
TRUNKS = {"resnet18": ">= 0.9", "mobilenet_v3_small": ""}  # with what is asked of the ratio


@dataclass
class Seen:
    """Of one trunk, one value a round."""

    capacities: list[float] = field(default_factory=list)
    goodputs: list[float] = field(default_factory=list)
    overloaded: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    refusals_ms: list[float] = field(default_factory=list)


def main() -> None:
    """Alternate between full load, capacity and overload, for one trunk and then the other."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (2, 3.0) if chosen.quick else (7, 8.0)
    figures = [
        figure
        for trunk, aim in TRUNKS.items()
        for figure in _figures(trunk, aim, _measured(trunk, rounds, seconds))
    ]
    finish("overload", figures, chosen)


def _measured(name: str, rounds: int, seconds: float) -> Seen:
    jpeg, seen = photograph(), Seen()
    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder) / "trunk"
        make_trunk(trunk, name=name)
        with serving(Path(folder) / "store", trunk=trunk) as service:
            with Client(service["url"]) as client:
                client.push(make_bundle(trunk, task="photos", seed=0))
            url = f"{service['url']}/predict/photos"
            # Not counted: HAProxy is reloaded soon after the start, and closes connections then.
            asyncio.run(run_load(url, jpeg, connections=CONNECTIONS, seconds=2.0))
            for number in range(rounds):
                full = asyncio.run(run_load(url, jpeg, connections=CONNECTIONS, seconds=seconds))
                assert not full.num_failed, f"{full.num_failed} requests failed"
                at_capacity, over = (
                    _open_load(url, jpeg, factor * full.rate, seconds, seed=number)
                    for factor in (1, OVERLOAD)
                )
                seen.capacities.append(full.rate)
                seen.goodputs.append(_goodput(at_capacity))
                seen.overloaded.append(_goodput(over))
                seen.late.append(sum(latency > LIMIT_S for latency in over.latencies_s) / seconds)
                seen.refusals_ms.extend(1000 * refusal for refusal in over.refusals_s)
                note(
                    f"{name}, round {number + 1} of {rounds}: capacity {full.rate:.0f}/s, in time "
                    f"{seen.goodputs[-1]:.0f}/s at capacity, {seen.overloaded[-1]:.0f}/s at three "
                    f"times that, {len(over.refusals_s)} refused, {seen.late[-1]:.1f}/s late"
                )
    return seen


def _open_load(url: str, jpeg: bytes, rate: float, seconds: float, *, seed: int) -> Load:
    headers = (f"x-headstock-timeout-ms: {1000 * LIMIT_S:.0f}",)
    return asyncio.run(
        run_open_load(
            url,
            jpeg,
            rate=rate,
            seconds=seconds,
            seed=seed,
            headers=headers,
            warm_up_s=2 * LIMIT_S,
            give_up_s=2 * LIMIT_S,
        )
    )


def _goodput(load: Load) -> float:
    """Answers in time, a second."""
    return sum(latency <= LIMIT_S for latency in load.latencies_s) / load.seconds


def _figures(trunk: str, aim: str, seen: Seen) -> Iterator[Figure]:
    over, at_capacity = seen.overloaded, seen.goodputs
    ratios = [high / low for high, low in zip(over, at_capacity, strict=True)]
    yield median_of(
        f"{trunk}: in time at {OVERLOAD} times ÷ at capacity", ratios, unit="ratio", aim=aim
    )
    rates = {"answered by 8 connections": seen.capacities, "in time at capacity": at_capacity}
    rates |= {f"in time at {OVERLOAD} times": over, f"late at {OVERLOAD} times": seen.late}
    for name, values in rates.items():
        yield median_of(f"{trunk}: {name}", values, unit="pictures/s")
    yield median_of(f"{trunk}: a refusal takes", seen.refusals_ms, unit="ms")


if __name__ == "__main__":
    main()
