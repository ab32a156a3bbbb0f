"""A small network as a head: one hidden layer, dropout, stopped early."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from models.evaluate import accuracy
from models.fitting import Fitted, Score, fit, parameter_groups
from models.heads import HeadError, check_rows, logits_of, standard_of
from models.progress import ProgressCallback, unheard

NUM_HIDDEN = 256
RATE = 1e-3
BATCH_SIZE = 32
NUM_EPOCHS, PATIENCE = 60, 10


class MlpHead(nn.Module):
    """Features -> `NUM_HIDDEN` rectified values -> logits; any standardisation is folded in.

    Source: dropout on the hidden layer, Srivastava et al. 2014, JMLR 15:1929-1958.
    """

    def __init__(self, num_features: int, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_features, NUM_HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(NUM_HIDDEN, num_classes)

    @override
    def forward(
        self, features: Float[Tensor, "rows num_features"]
    ) -> Float[Tensor, "rows num_classes"]:
        """Features to logits."""
        return self.output(self.dropout(F.relu(self.hidden(features))))


def mlp_head(
    features: Float[Tensor, "rows num_features"],
    labels: Int[Tensor, " rows"],
    validation_features: Float[Tensor, "validation_rows num_features"],
    validation_labels: Int[Tensor, " validation_rows"],
    *,
    num_classes: int,
    dropout: float,
    seed: int,
    progress: ProgressCallback = unheard,
) -> tuple[MlpHead, Fitted]:
    """Train on standardised features and keep the epoch that is best on validation.

    Args:
        dropout: Share of the hidden values that each training row is without, 0 to below 1.

    Raises:
        HeadError: no validation row, a class without a row, or features with NaN.
        TrainingError: a loss is not finite.
    """
    check_rows(features, labels, num_classes=num_classes)
    if not len(validation_labels):
        raise HeadError(
            "An MLP needs validation pictures to know when to stop; expected at least 2 pictures "
            "in some class. Add pictures, or train a cosine head."
        )
    mean, deviation = (torch.from_numpy(value).float() for value in standard_of(features))
    rows, validation = ((part - mean) / deviation for part in (features, validation_features))
    num_batches = max(1, round(len(rows) / BATCH_SIZE))

    def epoch_batches(epoch: int) -> Iterator[Tensor]:
        order = np.random.default_rng((seed, epoch)).permutation(len(rows))
        return iter(torch.from_numpy(order).tensor_split(num_batches))

    def validate() -> Score:
        head.eval()
        logits = logits_of(head, validation)
        loss = F.cross_entropy(logits, validation_labels)
        return Score(accuracy(logits, validation_labels).value, -float(loss))

    # Dropout and the first weights draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = MlpHead(features.shape[1], num_classes, dropout=dropout)
        fitted = fit(
            head,
            epoch_batches=epoch_batches,
            num_batches=num_batches,
            loss_of=lambda batch: F.cross_entropy(head(rows[batch]), labels[batch]),
            validate=validate,
            before_epoch=lambda _epoch: head.train(),
            start_is_usable=False,
            optimizer=torch.optim.AdamW(list(parameter_groups(head, rate=RATE))),
            num_epochs=NUM_EPOCHS,
            patience=PATIENCE,
            stage="mlp",
            progress=progress,
        )
    with torch.no_grad():
        head.hidden.weight.div_(deviation)
        head.hidden.bias.sub_(head.hidden.weight @ mean)
    return head, fitted
