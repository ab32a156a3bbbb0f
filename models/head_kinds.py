"""The kinds of heads on frozen features: how each is fitted, and how its settings are chosen."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedKFold
from torch import Tensor, nn
from typing_extensions import TypeIs

from models.heads import cosine_head, logits_of
from models.logistic import choose_logistic_head, logistic_head
from models.mlp import mlp_head
from models.neighbours import neighbours_head
from models.svm import linear_svm_head, rbf_svm_head

HeadKind = Literal["linear", "cosine", "linear_svm", "rbf_svm", "knn", "mlp"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
Setting = Mapping[str, float | int]
COSINE_SCALES = (2.0, 4.0, 8.0, 16.0, 32.0)
DEFAULT_SCALE = 8.0
DROPOUTS = (0.2, 0.5, 0.8)
# With so few pictures of train and validation together, all of them choose, each by heads that did
# not learn from it: 60 pictures of validation alone tie most settings.
MAX_FOLD_ROWS = 1_000
NUM_FOLDS = 5
# A factor of 1.1 apart: a score changes by less than 0.03.
TEMPERATURES = torch.logspace(-3, 2, 121, dtype=torch.float64)


@dataclass(frozen=True)
class Known:
    """Features and labels that may be learned from: those of train, then those of validation."""

    features: Float[Tensor, "rows num_features"]
    labels: Int[Tensor, " rows"]
    num_train: int
    num_classes: int
    seed: int

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """Features and labels to fit on."""
        return self.features[: self.num_train], self.labels[: self.num_train]

    @property
    def validation(self) -> tuple[Tensor, Tensor]:
        """Features and labels to choose on; may be empty."""
        return self.features[self.num_train :], self.labels[self.num_train :]


@dataclass(frozen=True)
class FittedHead:
    """A head with what was chosen for it.

    Args:
        on_train: The head that learned from train alone, which validation may judge.
        head: The head to use.
        temperature: What its logits are divided by before the softmax.
        chosen_by: In words.
    """

    on_train: nn.Module
    head: nn.Module
    setting: Setting
    temperature: float
    chosen_by: str


def is_head_kind(strategy: str) -> TypeIs[HeadKind]:
    """Whether a strategy is one of these kinds."""
    return strategy in HEAD_KINDS


def fit_head(kind: HeadKind, known: Known) -> FittedHead:
    """Choose a kind's settings and fit it. Same data and seed, same head.

    Raises:
        HeadError: a class has no row in train, or see the kind's own function.
    """
    return _KINDS[kind](known)


def choose_temperature(
    logits: Float[Tensor, "rows num_classes"], labels: Int[Tensor, " rows"]
) -> tuple[float, float]:
    """The temperature whose softmax has the least cross-entropy, and that cross-entropy in nats.

    Args:
        logits: Of rows that the head did not learn from.

    Source: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """
    losses = [float(F.cross_entropy(logits.double() / value, labels)) for value in TEMPERATURES]
    best = int(np.argmin(losses))
    return float(TEMPERATURES[best]), losses[best]


def _linear(known: Known) -> FittedHead:
    on_train, l2 = choose_logistic_head(
        *known.train, *known.validation, num_classes=known.num_classes
    )
    head = logistic_head(known.features, known.labels, num_classes=known.num_classes, l2=l2)
    return FittedHead(on_train, head, {"l2": l2}, 1.0, _chosen_by(known))


def _cosine(known: Known) -> FittedHead:
    """Only the scale is chosen: it changes how sure the head is, not which class is first."""
    on_train = cosine_head(*known.train, num_classes=known.num_classes, scale=DEFAULT_SCALE)
    features, labels = known.validation
    scale = DEFAULT_SCALE
    if len(labels):
        unscaled = logits_of(on_train, features) / DEFAULT_SCALE
        losses = {s: float(F.cross_entropy(s * unscaled, labels)) for s in COSINE_SCALES}
        scale = min(losses, key=lambda value: losses[value])
    on_train.scale.fill_(scale)
    head = cosine_head(known.features, known.labels, num_classes=known.num_classes, scale=scale)
    return FittedHead(on_train, head, {"scale": scale}, 1.0, _chosen_by(known))


def _mlp(known: Known) -> FittedHead:
    """What stopped it has to stay unseen, so it learns from train alone."""
    tried = [
        (dropout, *mlp_head(
            *known.train, *known.validation, num_classes=known.num_classes, dropout=dropout,
            seed=known.seed,
        ))
        for dropout in DROPOUTS
    ]  # fmt: skip
    dropout, head, _ = max(tried, key=lambda one: one[2].best)
    return FittedHead(head, head, {"dropout": dropout}, 1.0, "validation, which stopped it too")


@dataclass(frozen=True)
class _Grid:
    """A kind whose logits have no scale of their own, and settings that are tried in turn.

    Args:
        fit: Features, labels, `num_classes` and a setting -> head.
        settings: What is tried; the first is taken where there is nothing to choose on.
        temperature: Where there is nothing to choose on (assumed).
    """

    fit: Callable[..., nn.Module]
    settings: tuple[Setting, ...]
    temperature: float

    def __call__(self, known: Known) -> FittedHead:
        """Take the setting with the least cross-entropy at its own best temperature."""
        fit = partial(self.fit, num_classes=known.num_classes)
        setting, temperature = self.settings[0], self.temperature
        parts = list(_parts(known))
        if parts:
            judged = torch.from_numpy(np.concatenate([unseen for _, unseen in parts]))
            labels = known.labels[judged]
            tried: list[tuple[float, float, Setting]] = []
            for one in self.settings:
                logits = [
                    logits_of(
                        fit(known.features[seen], known.labels[seen], **one),
                        known.features[unseen],
                    )
                    for seen, unseen in parts
                ]
                value, loss = choose_temperature(torch.cat(logits), labels)
                tried.append((loss, value, one))
            _, temperature, setting = min(tried, key=lambda one: one[0])
        return FittedHead(
            fit(*known.train, **setting),
            fit(known.features, known.labels, **setting),
            setting,
            temperature,
            f"cross-validation in {len(parts)} parts" if len(parts) > 1 else _chosen_by(known),
        )


def _parts(known: Known) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows to fit on with the rows that judge: folds of few pictures, else train and validation."""
    rarest = int(known.labels.bincount(minlength=known.num_classes).min())
    if len(known.labels) <= MAX_FOLD_ROWS:
        if rarest > 1:
            folds = StratifiedKFold(min(NUM_FOLDS, rarest), shuffle=True, random_state=known.seed)
            yield from folds.split(known.features.numpy(), known.labels.numpy())
    elif len(known.validation[1]):
        rows = np.arange(len(known.labels))
        yield rows[: known.num_train], rows[known.num_train :]


def _chosen_by(known: Known) -> str:
    return "validation" if len(known.validation[1]) else "no pictures: it is the usual one"


_KINDS: Mapping[HeadKind, Callable[[Known], FittedHead]] = MappingProxyType(
    {
        "linear": _linear,
        "cosine": _cosine,
        "linear_svm": _Grid(
            linear_svm_head,
            tuple({"c": c} for c in (1.0, 0.1, 0.01, 10.0, 100.0)),
            temperature=0.5,
        ),
        "rbf_svm": _Grid(
            rbf_svm_head,
            tuple({"c": c, "gamma": g} for g in (1.0, 0.25) for c in (1.0, 3.0, 10.0)),
            temperature=0.5,
        ),
        "knn": _Grid(
            neighbours_head,
            tuple({"num_neighbours": k} for k in (5, 1, 10, 20, 50)),
            temperature=0.1,
        ),
        "mlp": _mlp,
    }
)
