"""Figures of a benchmark: ratios of one run with their spread, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import operator
import os
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

COMPARISONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval, and whether it meets its aim.

    Args:
        aim: Such as ">= 0.6"; empty for a figure that only informs.
    """

    name: str
    value: float
    low: float
    high: float
    unit: str
    aim: str = ""
    holds: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "holds", not self.aim or _meets(self.value, self.aim))


def median_of(name: str, samples: Sequence[float], *, unit: str, aim: str = "") -> Figure:
    """The median over rounds, with a bootstrap interval (2,000 resamples, fixed seed)."""
    chance = np.random.default_rng(0)
    medians = np.median(chance.choice(samples, (2000, len(samples))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return Figure(name, statistics.median(samples), float(low), float(high), unit, aim)


def quantile_of(
    name: str, samples: Sequence[float], share: float, *, unit: str, aim: str = ""
) -> Figure:
    """A quantile over all samples, with a bootstrap interval (2,000 resamples, fixed seed)."""
    chance = np.random.default_rng(0)
    resampled = np.quantile(chance.choice(samples, (2000, len(samples))), share, axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Figure(name, float(np.quantile(samples, share)), float(low), float(high), unit, aim)


def arguments(description: str) -> argparse.Namespace:
    """`--quick`, `--json` and `--check`, which every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="about a minute; wider intervals")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--check", action="store_true", help="exit 1 if an aim is missed")
    return parser.parse_args()


def finish(benchmark: str, figures: Sequence[Figure], chosen: argparse.Namespace) -> None:
    """Print the figures and leave with the exit code that `--check` asks for."""
    if chosen.json:
        body = {
            "benchmark": benchmark,
            "machine": machine(),
            "figures": [asdict(figure) for figure in figures],
        }
        sys.stdout.write(json.dumps(body, indent=2) + "\n")
    else:
        Console().print(_table(benchmark, figures))
    sys.exit(1 if chosen.check and not all(figure.holds for figure in figures) else 0)


def note(text: str) -> None:
    """Say how far a benchmark is, on standard error."""
    Console(stderr=True).print(text, highlight=False)


def machine() -> str:
    """Processor, cores and Python, for those who compare."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = found[1]
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _meets(value: float, aim: str) -> bool:
    sign, bound = aim.split()[:2]
    return bool(COMPARISONS[sign](value, float(bound)))


def _table(benchmark: str, figures: Sequence[Figure]) -> Table:
    table = Table("figure", "value", "95 % interval", "unit", "aim", "holds", title=benchmark)
    for f in figures:
        holds = ("yes" if f.holds else "NO") if f.aim else ""
        interval = f"{f.low:.3g} to {f.high:.3g}"
        table.add_row(f.name, f"{f.value:.3g}", interval, f.unit, f.aim, holds)
    table.caption = machine()
    return table
