"""The training loop that all learning shares: schedule, early stopping, the best kept."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import Backbone
from models.data import Split
from models.errors import LearningError
from models.evaluate import accuracy
from models.heads import Head, features_of, logits_of
from models.progress import Progress, ProgressCallback

# Large gradients of the first steps (a new head, empty Adam moments) hurt a trained trunk most.
WARM_UP_SHARE = 0.1
MAX_GRADIENT_NORM = 5.0
WEIGHT_DECAY = 0.05

AnyBatch = TypeVar("AnyBatch")


class TrainingError(LearningError):
    """A training run cannot go on, or cannot start."""


@dataclass(frozen=True, order=True)
class Score:
    """How good a state is on validation: by accuracy, and where that ties by loss."""

    accuracy: float
    negative_loss: float


def fit(
    trained: nn.Module,
    *,
    epoch_batches: Callable[[int], Iterable[AnyBatch]],
    num_batches: int,
    loss_of: Callable[[AnyBatch], Tensor],
    validate: Callable[[], Score],
    before_epoch: Callable[[], object],
    start_is_usable: bool,
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    patience: int,
    stage: str,
    progress: ProgressCallback,
) -> tuple[int, Score]:
    """Train and leave `trained` in its best state on validation.

    Args:
        trained: Every module that the optimizer changes.
        epoch_batches: Epoch number -> its batches, `num_batches` of them.
        before_epoch: Puts modules into the mode they train in.
        start_is_usable: Whether the state before training may turn out as the best.
        patience: Epochs without a better validation score before giving up.

    Returns:
        The best epoch (0: as it was before) and its score.

    Raises:
        TrainingError: a loss is not finite.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_steps=num_epochs * num_batches)
    )
    best = validate() if start_is_usable else Score(-math.inf, -math.inf)
    best_epoch, best_state = 0, copy.deepcopy(trained.state_dict())
    for epoch in range(1, num_epochs + 1):
        before_epoch()
        for batch in epoch_batches(epoch):
            _step(loss_of(batch), trained, optimizer, epoch=epoch)
            schedule.step()
        score = validate()
        if score > best:
            best, best_epoch, best_state = score, epoch, copy.deepcopy(trained.state_dict())
        note = f"validation {score.accuracy:.3f}, best {best.accuracy:.3f}"
        progress(Progress(stage, epoch, num_epochs, note))
        if epoch - best_epoch >= patience:
            break
    trained.load_state_dict(best_state)
    trained.eval()
    return best_epoch, best


def learning_rate_factor(step: int, *, num_steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    warm_up = max(1, round(WARM_UP_SHARE * num_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, num_steps - warm_up)))


def freeze_batch_statistics(network: nn.Module) -> None:
    """Keep the running statistics that came with the weights.

    A few dozen pictures a batch, a few hundred in all, would replace statistics of a million
    pictures by noise, and training on batch statistics but testing on running ones adds a gap of
    its own. Scale and shift still learn.
    """
    for module in _batch_norms(network):
        module.eval()


def follow_batch_statistics(backbone: Backbone, *, num_batches: int) -> None:
    """Let running statistics forget what is older than about one epoch.

    At PyTorch's usual momentum of 0.1 they trail the weights by some 30 batches, which is several
    epochs of a small set: trained on 200 digits, validation stayed at chance (0.10) for 4 epochs;
    with statistics that follow, it was 0.35 after the third.
    """
    for module in _batch_norms(backbone):
        # After one epoch e^-3, or 5 %, is left of what was before.
        module.momentum = min(1.0, max(0.1, 3 / num_batches))


def _batch_norms(network: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 (base of all three)
            yield module


def score(backbone: Backbone, head: Head, split: Split) -> Score:
    """How good a state is on a split."""
    logits = logits_of(head, features_of(backbone, split, stage="validation"))
    loss = F.cross_entropy(logits, split.labels)
    return Score(accuracy(logits, split.labels).value, -float(loss))


def parameter_groups(module: nn.Module, *, rate: float) -> Iterator[dict[str, Any]]:
    """AdamW's groups of what learns: biases, scales and shifts are not decayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for is_matrix, decay in ((True, WEIGHT_DECAY), (False, 0.0)):
        members = [p for p in parameters if (p.ndim > 1) == is_matrix]
        yield {"params": members, "lr": rate, "weight_decay": decay}


def _step(
    loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer, *, epoch: int
) -> None:
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"The loss became {loss.item()} in epoch {epoch}; expected a finite number. "
            "Lower the learning rate, or check the weights that training started from."
        )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
