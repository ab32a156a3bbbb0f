"""Backbones: pictures to features, cut once into a prefix and a suffix.

The suffix is the last stage of the network, the place where adapters live and tails begin; its
output is the pooled features that the network's own classifier would read.
"""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from typing_extensions import override

from models.architectures import (
    Architecture,
    BackboneError,
    backbone_names,
    find_architecture,
    torchvision_state,
)
from models.weights import WeightsReport, check_trained, load_weights, no_weights, read_state

__all__ = ["Architecture", "Backbone", "BackboneError", "backbone_names", "build_backbone"]


class Backbone(nn.Module):
    """Decoded pictures to features. Its state dict has the keys `prefix.*` and `suffix.*` only.

    Raises:
        BackboneError: the architecture does not keep its contract.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: Architecture, *, reference: str) -> None:
        super().__init__()
        self.name = architecture.name
        self.cut = architecture.cut
        self.preprocessing = architecture.preprocessing
        self.reference = reference
        self.prefix = architecture.prefix
        self.suffix = architecture.suffix
        # Not persistent: preprocessing belongs to the record of a checkpoint, not to its weights.
        for name, values in (
            ("mean", self.preprocessing.mean),
            ("std", self.preprocessing.std),
        ):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        _check_parts(architecture, self)
        self.num_features = _count_features(self)

    def normalise(
        self, images: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decoded pictures, 0..255, to what the prefix takes."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    @override
    def forward(
        self, images: UInt8[Tensor, "batch height width 3"]
    ) -> Float[Tensor, "batch features"]:
        """Decoded pictures to features."""
        return self.suffix(self.prefix(self.normalise(images)))

    @property
    def num_parameters(self) -> int:
        """Learned values, prefix and suffix together."""
        return sum(parameter.numel() for parameter in self.parameters())


def build_backbone(
    reference: str,
    *,
    weights: str | Path | None,
    allow_untrained: bool = False,
    seed: int = 0,
) -> tuple[Backbone, WeightsReport]:
    """Build a backbone and load its weights.

    Args:
        reference: A name out of `backbone_names()`, or `path/to/my_nets.py:function`, a function
            without arguments that returns an `Architecture`. That file is run.
        weights: "torchvision" (downloads ImageNet weights), a .safetensors or .pth file, or None.
        allow_untrained: Accept a trunk with values that were not loaded.
        seed: Seed of the values that are not loaded.

    Returns:
        The backbone, in evaluation mode, and what came of loading its weights.

    Raises:
        BackboneError: unknown name, or the function does not keep the contract.
        WeightsError: weights cannot be read or leave the trunk untrained.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        architecture, reference = find_architecture(reference)
    backbone = Backbone(architecture, reference=reference)
    if weights is None:
        report = no_weights(backbone)
    else:
        is_published = weights == "torchvision"
        state = torchvision_state(reference) if is_published else read_state(Path(weights))
        report = load_weights(architecture.network, backbone, state, source=str(weights))
    if not allow_untrained:
        check_trained(report, reference=reference)
    return backbone.eval(), report


def _check_parts(architecture: Architecture, backbone: Backbone) -> None:
    """Weights are loaded into the network, so the parts have to share its tensors."""
    own = {id(tensor) for tensor in architecture.network.state_dict(keep_vars=True).values()}
    for key, tensor in backbone.state_dict(keep_vars=True).items():
        if id(tensor) not in own:
            raise BackboneError(
                f"{backbone.reference}: {key} is no part of `network`; "
                "build prefix and suffix from the network's own layers."
            )


def _count_features(backbone: Backbone) -> int:
    """Run one black picture through, which also proves that the parts fit together."""
    size = backbone.preprocessing.size_px
    try:
        with torch.no_grad():
            images = torch.zeros(1, size, size, 3, dtype=torch.uint8)
            features = backbone.eval().suffix(backbone.prefix(backbone.normalise(images)))
    except Exception as error:
        raise BackboneError(
            f"{backbone.reference} fails on a picture of {size} px: {error}. Prefix and suffix "
            "have to take float32 [batch, 3, size, size] to features [batch, num_features]."
        ) from error
    if features.ndim != 2 or features.dtype != torch.float32:  # noqa: PLR2004
        raise BackboneError(
            f"{backbone.reference} gives {features.dtype} {list(features.shape)}; expected "
            "float32 [batch, num_features]: end the suffix with pooling and flattening."
        )
    return features.shape[1]
