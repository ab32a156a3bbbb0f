"""How accuracy grows with the number of pictures: would more of them help?"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.comparison import NUM_FOLDS, folds
from models.evaluate import Estimate, share
from models.heads import logits_of
from models.logistic import choose_logistic_head
from models.paired import Difference, difference
from models.progress import Progress, ProgressCallback, unheard

# Each twice the one before, so that the last step says what twice the pictures brought.
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy of a linear head that learned from so many pictures.

    Args:
        gained: Accuracy less that at the point before, on the same pictures; None at the first.
    """

    num_pictures: int
    accuracy: Estimate
    gained: Difference | None


def learning_curve(
    features: Float[Tensor, "pictures num_features"],
    labels: Int[Tensor, " pictures"],
    *,
    num_classes: int,
    seed: int,
    progress: ProgressCallback = unheard,
) -> tuple[CurvePoint, ...]:
    """Train linear heads on growing parts of the pictures, judged on pictures held out from all.

    Every picture is held out once, in one of three folds; of the others each head learns from the
    first eighth, quarter, half, or all, every class alike. Where a class has too few pictures for
    a share, the share is left out; with fewer than 6 there is no curve.

    Args:
        features: Of train and validation; never of test.
    """
    if int(labels.bincount(minlength=num_classes).min()) < 2 * NUM_FOLDS:
        return ()
    random = torch.Generator().manual_seed(seed)
    shares = dict.fromkeys(SHARES, 0)
    is_right = {share_of: torch.zeros(len(labels), dtype=torch.bool) for share_of in SHARES}
    for at, (*known, held_out) in enumerate(folds(labels, seed=seed), start=1):
        # Pictures of a class may come sorted by something else.
        mixed = [rows[torch.randperm(len(rows), generator=random)] for rows in known]
        for share_of in tuple(shares):
            train, stop = (_first(rows, labels, share_of) for rows in mixed)
            if len(labels[train].unique()) < num_classes:
                del shares[share_of]
                continue
            head, _ = choose_logistic_head(
                features[train], labels[train], features[stop], labels[stop],
                num_classes=num_classes,
            )  # fmt: skip
            named = logits_of(head, features[held_out]).argmax(dim=-1)
            is_right[share_of][held_out] = named == labels[held_out]
            shares[share_of] = len(train) + len(stop)
        progress(Progress("learning curve", at, NUM_FOLDS))
    points: list[CurvePoint] = []
    before: Tensor | None = None
    for share_of, num_pictures in shares.items():
        right = is_right[share_of]
        gained = difference(right, before) if before is not None else None
        points.append(CurvePoint(num_pictures, share(int(right.sum()), len(right)), gained))
        before = right
    return tuple(points)


def _first(rows: Tensor, labels: Tensor, share_of: float) -> Tensor:
    """The first rows of every class; a larger share holds a smaller one."""
    kept: list[Tensor] = []
    for label in labels.unique():
        members = rows[labels[rows] == label]
        kept.append(members[: round(share_of * len(members))])
    return torch.cat(kept)
