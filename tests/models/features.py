"""Random features with labels: three clouds that overlap."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def clouds(
    num_rows: int, *, num_classes: int = 3, num_features: int = 12, seed: int = 0
) -> tuple[Float[Tensor, "rows features"], Int[Tensor, " rows"]]:
    """All positive, as pooled features are, and of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, num_features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(num_rows) % num_classes
    rows = centres[labels] + 1.5 * torch.randn(num_rows, num_features, generator=generator)
    return torch.nn.functional.softplus(rows) * torch.logspace(-2, 2, num_features), labels
