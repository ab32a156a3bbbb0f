"""A backbone with its head while they are fine-tuned: what learns when, and what is minimised."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.averaging import WeightAverage, renew_batch_statistics
from models.backbones import Backbone
from models.batches import Batch, TrainingPictures
from models.blocks import Block, blocks_of, relative_gradient_norms
from models.data import PictureData
from models.fine_tuning import FineTuning, FineTuningError
from models.fitting import (
    batch_norms,
    follow_batch_statistics,
    freeze_batch_statistics,
    parameter_groups,
)
from models.heads import EXTRACT_BATCH, LinearHead
from models.regularisers import balanced_weights, classification_loss, l2_sp_penalty, mixer

# The head has to move far and a trained trunk only a little.
TRUNK_SHARE = 0.3


class Tuned:
    """What happens to a backbone and its head in every step, as the settings have it.

    Args:
        data: Its training split is learned from.

    Raises:
        FineTuningError: the backbone has no block of the number that is asked for.
    """

    def __init__(
        self, backbone: Backbone, head: LinearHead, data: PictureData, how: FineTuning
    ) -> None:
        self.backbone = backbone
        self.head = head
        self.network = nn.ModuleDict({"backbone": backbone, "head": head})
        self.blocks = blocks_of(backbone)
        self.gradient_norms: list[float] = []
        self.data = data
        self._how = how
        self._device = backbone.mean.device
        # bfloat16 has the range of float32, so no gradient has to be scaled.
        self._is_mixed = self._device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._labels = data.train.labels
        self._starts = tuple(p.detach().clone() for p in backbone.parameters())
        regularisation, num_classes = how.regularisation, len(data.labels)
        self._mix = mixer(regularisation.mix, num_classes=num_classes)
        self._class_weights = (
            balanced_weights(self._labels, num_classes=num_classes).to(self._device)
            if regularisation.balance == "weights"
            else None
        )
        self._surgical = self._choose_block() if how.strategy == "surgical" else None

    @property
    def chosen_block(self) -> Block | None:
        """The one that learns beside the head, of "surgical"."""
        return None if self._surgical is None else self.blocks[self._surgical]

    def optimizer(self) -> torch.optim.AdamW:
        """The head fastest, then from the last block to the first ever slower."""
        how, regularisation = self._how, self._how.regularisation
        share = 1.0 if how.strategy == "scratch" else TRUNK_SHARE
        # A pull to where the backbone started takes the place of one to zero.
        decay = 0.0 if regularisation.l2_sp else regularisation.weight_decay
        groups = [
            *parameter_groups(self.head, rate=how.rate, weight_decay=regularisation.weight_decay)
        ]
        for height, block in enumerate(reversed(self.blocks)):
            rate = how.rate * share * how.rate_decay**height
            groups += parameter_groups(block.layers, rate=rate, weight_decay=decay)
        return torch.optim.AdamW(groups)

    def prepare(self, epoch: int, *, num_batches: int) -> None:
        """Training mode; only the blocks that learn in this epoch, from 1 on, get gradients."""
        self.network.train()
        freeze_batch_statistics(self.backbone)
        learning = self._learning(epoch)
        for at, block in enumerate(self.blocks):
            block.layers.requires_grad_(at in learning)
            if at in learning and self._how.batch_norm == "follow":
                follow_batch_statistics(block.layers, num_batches=num_batches)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Of the head's logits, with all that the settings add to it."""
        backbone, regularisation = self.backbone, self._how.regularisation
        images = backbone.normalise(batch.images[backbone.preprocessing].to(self._device))
        targets = self._labels[batch.rows].to(self._device)
        if self._mix is not None:
            images, targets = self._mix(images, targets)
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._is_mixed):
            features = backbone.suffix(backbone.prefix(images))
            logits = self.head(F.dropout(features, regularisation.dropout))
        loss = classification_loss(
            logits.float(),
            targets,
            class_weights=self._class_weights,
            label_smoothing=regularisation.label_smoothing,
        )
        if not regularisation.l2_sp:
            return loss
        parameters = list(backbone.parameters())
        return loss + l2_sp_penalty(parameters, self._starts, strength=regularisation.l2_sp)

    def average(self, pictures: TrainingPictures) -> WeightAverage | None:
        """The average of the weights, if one is asked for."""
        num_epochs = self._how.regularisation.average_epochs
        if not num_epochs:
            return None

        def settle() -> None:
            self.network.eval()
            if self._how.batch_norm == "follow":
                learning = self._learning(self._how.num_epochs)
                norms = [norm for at in learning for norm in batch_norms(self.blocks[at].layers)]
                size = self.backbone.preprocessing
                views = (batch.images[size].to(self._device) for batch in pictures.epoch(0))
                renew_batch_statistics(norms, self.backbone, views)

        return WeightAverage(
            self.network, num_steps=num_epochs * pictures.num_batches, settle=settle
        )

    def _learning(self, epoch: int) -> range:
        """Places of the blocks that learn in an epoch."""
        num = len(self.blocks)
        match self._how.strategy:
            case "linear":
                return range(0)
            case "last":
                return range(num - 1, num)
            case "surgical":
                assert self._surgical is not None
                return range(self._surgical, self._surgical + 1)
            case "gradual":
                return range(max(0, num - epoch), num)
            case _:
                return range(num)

    def _choose_block(self) -> int:
        if self._how.block is None:
            self.gradient_norms = relative_gradient_norms(self.blocks, self._losses)
            return max(range(len(self.blocks)), key=self.gradient_norms.__getitem__)
        if self._how.block > len(self.blocks):
            names = ", ".join(block.name for block in self.blocks)
            raise FineTuningError(
                f"block is {self._how.block}; expected 1 to {len(self.blocks)}: "
                f"{self.backbone.name} has blocks that begin at {names}."
            )
        return self._how.block - 1

    def _losses(self) -> Iterator[tuple[Tensor, float]]:
        """Of the training pictures as they are, in evaluation mode."""
        split, start = self.data.train, 0
        self.network.eval()
        for images in split.batches(self.backbone.preprocessing, batch_size=EXTRACT_BATCH):
            labels = self._labels[start : start + len(images)].to(self._device)
            start += len(images)
            loss = F.cross_entropy(self.head(self.backbone(images.to(self._device))), labels)
            yield loss, len(images) / len(split)
