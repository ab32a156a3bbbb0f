"""Torchvision's families with few channels, quick to cut, export and serve."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import VisionTransformer, vgg

from models.architectures import Architecture, cut_network
from models.backbones import Backbone
from models.pictures import Preprocessing

SIZE_PX = 32
VGG_PLAN = [4, "M", 8, "M", 8, 8, "M", 16, 16, "M", 16, 16, "M"]


def small_vit() -> Backbone:
    """Four blocks of width 16 over 17 tokens; the last block is the suffix."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VisionTransformer(SIZE_PX, 8, 4, num_heads=2, hidden_dim=16, mlp_dim=32)
        # As it starts, a ViT's attention is all but even, and its classifier is zero.
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.3)
    return _backbone("small_vit", net, "encoder.layers.encoder_layer_3")


def small_vgg() -> Backbone:
    """VGG13's plan with batch norms and few channels, without its classifier of 120 M values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Module()
        net.add_module("features", vgg.make_layers(VGG_PLAN, batch_norm=True))
    return _backbone("small_vgg", net, "features.24")


def _backbone(name: str, network: nn.Module, cut: str) -> Backbone:
    middle = (127.5, 127.5, 127.5)
    preprocessing = Preprocessing(SIZE_PX, SIZE_PX, middle, middle)
    prefix, suffix = cut_network(network, cut)
    architecture = Architecture(name, network, prefix, suffix, cut, preprocessing)
    return Backbone(architecture, reference=name).eval()
