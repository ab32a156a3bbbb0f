"""Vision transformers cut in two: pictures to tokens, and tokens to the class token's features.

The blocks share torchvision's tensors but compute attention by plain products. So its projections
are linear layers with names, which adapters may change, and a tail's graph has no operator that
looks at shapes, which the gate for graphs would refuse.

Source: ViT, Dosovitskiy et al. 2021, arXiv:2010.11929, as torchvision builds it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import EncoderBlock
from typing_extensions import override


class Tokens(nn.Module):
    """The prefix: a token for each patch behind the class token, through the first blocks."""

    class_token: Tensor
    places: Tensor

    def __init__(self, network: VisionTransformer, blocks: nn.Module) -> None:
        super().__init__()
        self.patches = network.conv_proj
        self.class_token = network.class_token
        self.places = network.encoder.pos_embedding
        self.dropout = network.encoder.dropout
        self.blocks = blocks

    @override
    def forward(self, maps: Float[Tensor, "batch 3 size size"]) -> Float[Tensor, "batch tokens _"]:
        """Normalised pictures to tokens."""
        patches = self.patches(maps).flatten(2).transpose(1, 2)
        first = self.class_token.expand(patches.shape[0], -1, -1)
        return self.blocks(self.dropout(torch.cat([first, patches], dim=1) + self.places))


class ClassFeatures(nn.Module):
    """The suffix: the last blocks, then the class token, normalised, as the classifier reads it."""

    def __init__(self, network: VisionTransformer, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = network.encoder.ln

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] to features [batch, width]; torch.fx traces it."""
        return self.norm(self.blocks(tokens)[:, 0])


class Block(nn.Module):
    """Attention, then two layers token by token; each adds to what it is given."""

    def __init__(self, block: EncoderBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.ln_1, block.ln_2
        self.attention = Attention(block.self_attention)
        self.dropout = block.dropout
        self.mlp = block.mlp

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] to tokens of the same shape."""
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens)))
        return tokens + self.mlp(self.norm2(tokens))


class Attention(nn.Module):
    """Each token takes a mean of all, weighted by how well they suit it, once for each head.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attention.in_proj_weight is not None
        self.num_heads, self.head_width = attention.num_heads, attention.head_dim
        self.inward = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.outward = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.dropout = nn.Dropout(attention.dropout)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, tokens, width] to tokens of the same shape."""
        apart = self.inward(tokens).unflatten(-1, (3, self.num_heads, self.head_width))
        query, key, value = apart.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-2, -1) * self.head_width**-0.5
        means = self.dropout(scores.softmax(dim=-1)) @ value
        return self.outward(means.transpose(1, 2).flatten(2))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    # The very tensors, so that loading the network's weights loads these.
    layer.register_parameter("weight", _own(weight))
    if bias is not None:
        layer.register_parameter("bias", _own(bias))
    return layer


def _own(tensor: Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor


def cut_transformer(network: VisionTransformer, *, at: int) -> tuple[Tokens, ClassFeatures]:
    """Prefix and suffix, which share the network's tensors.

    Args:
        at: How many blocks the prefix has.
    """
    layers = [
        layer for layer in network.encoder.layers.children() if isinstance(layer, EncoderBlock)
    ]
    blocks = nn.Sequential(*(Block(one) for one in layers if isinstance(one, EncoderBlock)))
    return Tokens(network, blocks[:at]), ClassFeatures(network, blocks[at:])
