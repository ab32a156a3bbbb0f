"""The training loop that all learning shares: schedule, early stopping, the best kept."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.averaging import WeightAverage
from models.backbones import Backbone
from models.data import Split
from models.errors import LearningError
from models.evaluate import accuracy
from models.fine_tuning import ScheduleName
from models.heads import Head, features_of, logits_of
from models.progress import Progress, ProgressCallback
from models.resume import Snapshot
from models.schedules import start_schedule

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


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought.

    Args:
        loss: Mean over its batches of what was minimised.
    """

    number: int
    loss: float
    validation: Score


@dataclass(frozen=True)
class Fitted:
    """A finished run.

    Args:
        best_epoch: The epoch whose state was kept; 0: as it was before.
        epochs: All that were run.
    """

    best_epoch: int
    best: Score
    epochs: tuple[Epoch, ...]


def fit(
    trained: nn.Module,
    *,
    epoch_batches: Callable[[int], Iterable[AnyBatch]],
    num_batches: int,
    loss_of: Callable[[AnyBatch], Tensor],
    validate: Callable[[], Score],
    before_epoch: Callable[[int], object],
    start_is_usable: bool,
    optimizer: torch.optim.Optimizer,
    num_epochs: int,
    patience: int,
    stage: str,
    progress: ProgressCallback,
    schedule: ScheduleName = "cosine",
    average: WeightAverage | None = None,
    snapshot: Snapshot | None = None,
    keep_last: bool = False,
) -> Fitted:
    """Train and leave `trained` in its best state on validation, or in its last.

    Args:
        trained: Every module that the optimizer changes.
        epoch_batches: Epoch number -> its batches, `num_batches` of them.
        before_epoch: Puts modules into the mode that they train in; takes the epoch's number.
        start_is_usable: Whether the state before training may turn out as the best.
        patience: Epochs without a better validation score before giving up.
        average: Of `trained`; then its weights are validated and kept, not those of the last step.
        snapshot: Where to go on from and what to write after each epoch; who has kept the result
            removes it. A run that goes on gives the same bits as one that was never interrupted.
        keep_last: Keep the last state, as a fixed budget asks for, and never give up.

    Raises:
        TrainingError: a loss is not finite.
    """
    rates = start_schedule(schedule, optimizer, num_steps=num_epochs * num_batches)
    run = _Run(trained, optimizer, rates, average)
    saved = snapshot.load() if snapshot else None
    if saved:
        run.load(saved)
    elif start_is_usable:
        run.best = validate()
    while len(run.epochs) < num_epochs and len(run.epochs) - run.best_epoch < patience:
        number = len(run.epochs) + 1
        before_epoch(number)
        total = 0.0
        for batch in epoch_batches(number):
            total += _step(loss_of(batch), trained, optimizer, epoch=number)
            rates.step()
            if average:
                average.update()
        with average.in_place() if average else nullcontext():
            run.judge(Epoch(number, total / num_batches, score := validate()), keep=keep_last)
        if snapshot:
            snapshot.save(run.state())
        note = f"validation {score.accuracy:.3f}, best {run.best.accuracy:.3f}"
        values = {
            "training loss": run.epochs[-1].loss,
            "validation loss": -score.negative_loss,
            "validation accuracy": score.accuracy,
        }
        progress(Progress(stage, number, num_epochs, note, values))
    trained.load_state_dict(run.best_state)
    trained.eval()
    return Fitted(run.best_epoch, run.best, tuple(run.epochs))


class _Run:
    """Where a run stands after an epoch: all that the next one depends on."""

    def __init__(
        self,
        trained: nn.Module,
        optimizer: torch.optim.Optimizer,
        rates: torch.optim.lr_scheduler.LRScheduler,
        average: WeightAverage | None,
    ) -> None:
        self.epochs: list[Epoch] = []
        self.best, self.best_epoch = Score(-math.inf, -math.inf), 0
        self.best_state = copy.deepcopy(trained.state_dict())
        self._trained = trained
        self._parts = {"trained": trained, "optimizer": optimizer, "rates": rates}
        if average:
            self._parts["average"] = average.model

    def judge(self, epoch: Epoch, *, keep: bool) -> None:
        """Keep the state if no epoch before was better, or in any case."""
        self.epochs.append(epoch)
        if keep or epoch.validation > self.best:
            self.best, self.best_epoch = epoch.validation, epoch.number
            self.best_state = copy.deepcopy(self._trained.state_dict())

    def state(self) -> dict[str, Any]:
        """Tensors and plain values; what is drawn next is part of it."""
        return {
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "random": torch.get_rng_state(),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": asdict(self.best),
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"])
        self.epochs = [
            Epoch(epoch["number"], epoch["loss"], Score(**epoch["validation"]))
            for epoch in state["epochs"]
        ]
        self.best, self.best_epoch = Score(**state["best"]), state["best_epoch"]
        self.best_state = state["best_state"]


def freeze_batch_statistics(network: nn.Module) -> None:
    """Keep the running statistics that came with the weights.

    A few dozen pictures a batch, a few hundred in all, would replace statistics of a million
    pictures by noise, and training on batch statistics but testing on running ones adds a gap of
    its own. Scale and shift still learn.
    """
    for module in batch_norms(network):
        module.eval()


def follow_batch_statistics(network: nn.Module, *, num_batches: int) -> None:
    """Let running statistics forget what is older than about one epoch.

    At PyTorch's usual momentum of 0.1 they trail the weights by some 30 batches, which is several
    epochs of a small set: trained on 200 digits, validation stayed at chance (0.10) for 4 epochs;
    with statistics that follow, it was 0.35 after the third.
    """
    for module in batch_norms(network):
        module.train()
        # After one epoch e^-3, or 5 %, is left of what was before.
        module.momentum = min(1.0, max(0.1, 3 / num_batches))


def batch_norms(network: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    """Every batch norm in a network."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 (base of all three)
            yield module


def score(backbone: Backbone, head: Head, split: Split) -> Score:
    """How good a state is on a split."""
    logits = logits_of(head, features_of(backbone, split, stage="validation"))
    loss = F.cross_entropy(logits, split.labels)
    return Score(accuracy(logits, split.labels).value, -float(loss))


def parameter_groups(
    module: nn.Module, *, rate: float, weight_decay: float = WEIGHT_DECAY
) -> Iterator[dict[str, Any]]:
    """AdamW's groups of what learns: biases, scales and shifts are not decayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for is_matrix, decay in ((True, weight_decay), (False, 0.0)):
        members = [p for p in parameters if (p.ndim > 1) == is_matrix]
        yield {"params": members, "lr": rate, "weight_decay": decay}


def _step(
    loss: Tensor, trained: nn.Module, optimizer: torch.optim.Optimizer, *, epoch: int
) -> float:
    """Take one step down; the loss before it."""
    if not bool(torch.isfinite(loss)):
        raise TrainingError(
            f"The loss became {loss.item()} in epoch {epoch}; expected a finite number. "
            "Lower the learning rate, or check the weights that training started from."
        )
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(trained.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.item()
