"""Tails: a task's own copy of the suffix, with its head, as one network from the prefix map."""

import copy

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from models.backbones import Backbone
from models.fitting import freeze_batch_statistics
from models.heads import Head


class Tail(nn.Module):
    """Prefix maps to logits. Batch statistics stay as they came; see `freeze_batch_statistics`."""

    def __init__(self, suffix: nn.Module, head: Head) -> None:
        super().__init__()
        self.suffix = suffix
        self.head = head

    @override
    def forward(self, maps: Tensor) -> Float[Tensor, "rows num_classes"]:
        """Prefix maps to logits."""
        return self.head(self.suffix(maps))

    @override
    def train(self, mode: bool = True) -> "Tail":
        """Change the mode of everything but the batch norms."""
        super().train(mode)
        freeze_batch_statistics(self)
        return self


def own_tail(backbone: Backbone, head: Head) -> Tail:
    """A tail that starts as the trunk's suffix and this head; it copies both."""
    suffix = copy.deepcopy(backbone.suffix).requires_grad_(requires_grad=True)
    return Tail(suffix, copy.deepcopy(head)).eval()
