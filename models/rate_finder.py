"""Which learning rate is too low, which too high: a short run in which it rises with every step."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from models.fitting import TrainingError
from models.progress import Progress, ProgressCallback, unheard

LOWEST_RATE, HIGHEST_RATE = 1e-6, 1.0
NUM_STEPS = 100
# The loss of one batch says little: each value shown weighs the one before by so much.
SMOOTHING = 0.9
# Beyond this multiple of the least loss it is clear that the rate is too high.
BLOWN_UP = 4.0
# Where the loss is least, steps are as large as they can just be.
SAFETY = 10.0

AnyBatch = TypeVar("AnyBatch")


@dataclass(frozen=True)
class RateSweep:
    """What the loss did while the rate rose.

    Args:
        rates: Of the head, one a step, rising evenly on a logarithmic scale.
        losses: Smoothed, in nats.
        suggestion: A tenth of the rate at which the smoothed loss was least.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float

    def write(self, folder: Path) -> None:
        """`rates.json` and the plot `rates.svg`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rates.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.rates, self.losses)
        axes.axvline(self.suggestion, color="tab:orange", linestyle="--")
        axes.set(xscale="log", xlabel="learning rate of the head", ylabel="loss, smoothed")
        axes.set_title(f"suggested: --rate {self.suggestion:.1e}")
        # Without these two the same sweep would make another file every time.
        with rc_context({"svg.hashsalt": "headstock"}):
            figure.savefig(folder / "rates.svg", metadata={"Date": None})


def sweep_rates(
    optimizer: torch.optim.Optimizer,
    batches: Iterable[AnyBatch],
    loss_of: Callable[[AnyBatch], Tensor],
    *,
    num_steps: int = NUM_STEPS,
    lowest: float = LOWEST_RATE,
    highest: float = HIGHEST_RATE,
    progress: ProgressCallback = unheard,
) -> RateSweep:
    """Take steps at ever higher rates until the loss blows up. What learns is spoilt by it.

    Args:
        optimizer: Its first group has the rate that is swept; the others keep their ratio to it.
        batches: At least `num_steps`.

    Raises:
        TrainingError: the very first loss is not finite.

    Source: Smith 2015, arXiv:1506.01186, section 3.3; smoothing, end and suggestion as in fastai's
    `lr_find` (`minimum`).
    """
    ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    rising = np.geomspace(lowest, highest, num_steps).tolist()
    for rate, batch in zip(rising, batches, strict=False):
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = rate * ratio
        loss = loss_of(batch)
        average = SMOOTHING * average + (1 - SMOOTHING) * loss.item()
        # Without the correction the first values would be drawn to zero, where averaging starts.
        smoothed = average / (1 - SMOOTHING ** (len(losses) + 1))
        if not math.isfinite(smoothed) or (losses and smoothed > BLOWN_UP * min(losses)):
            break
        rates.append(rate)
        losses.append(smoothed)
        progress(Progress("find rate", len(losses), num_steps, f"loss {smoothed:.3f}"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not losses:
        raise TrainingError(
            f"The loss is {smoothed} before anything was learned; expected a finite number. "
            "Check the weights that training starts from."
        )
    return RateSweep(tuple(rates), tuple(losses), rates[int(np.argmin(losses))] / SAFETY)
