"""How learning rates change over the steps of a run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from models.fine_tuning import ScheduleName

# Large gradients of the first steps (a new head, empty Adam moments) hurt a trained trunk most.
WARM_UP_SHARE = 0.1


def start_schedule(name: ScheduleName, optimizer: Optimizer, *, num_steps: int) -> LRScheduler:
    """A schedule to be stepped `num_steps` times; each group's rate is its peak.

    "one-cycle" rises for 30 % of the steps from a 25th, then falls to next to nothing, while
    momentum goes the other way: Smith & Topin 2017, arXiv:1708.07120, as PyTorch has it.
    """
    if name == "cosine":
        return LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps=num_steps))
    peaks = [group["lr"] for group in optimizer.param_groups]
    # It looks at the rate after the last step too.
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=num_steps + 1)


def learning_rate_factor(step: int, *, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))
