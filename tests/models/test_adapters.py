"""Specification of models/adapters.py: what adapters compute, where they sit, what they leave."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from models.adapters import (
    AdaptedSuffix,
    AdapterError,
    AdapterKind,
    LowRank,
    ScaleShift,
    Site,
    adapt,
    fold,
    merged,
    sites_of,
)
from models.backbones import Architecture, Backbone, build_backbone
from models.pictures import Preprocessing

MY_NET = f"{Path(__file__).parents[1] / 'end_to_end' / 'my_nets.py'}:mobilenet_v1_025"
NETS = ("small32", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", MY_NET)
KINDS: tuple[AdapterKind, ...] = ("lora", "adapter", "ssf", "bias")
TINY = Preprocessing(size_px=8, resize_px=8, mean=(127.5,) * 3, std=(127.5,) * 3)


def lively(name: str) -> Backbone:
    """A backbone whose batch norms do something; fresh ones are all but the identity."""
    backbone, _ = build_backbone(name, weights=None, allow_untrained=True)
    return enliven(backbone)


def enliven(backbone: Backbone) -> Backbone:
    random = torch.Generator().manual_seed(1)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for values in (module.weight, module.running_var):
                assert isinstance(values, Tensor)
                values.data.uniform_(0.5, 1.5, generator=random)
            module.bias.data.normal_(generator=random)
            module.running_mean.normal_(std=0.1, generator=random)
        elif isinstance(module, nn.Conv2d):
            # Outputs of about unit scale, so that tolerances mean something.
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(std=fan_in**-0.5, generator=random)
    return backbone


def maps_of(backbone: Backbone, *, num: int = 3) -> Tensor:
    size = min(64, backbone.preprocessing.size_px)
    images = torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.prefix(2 * images - 1)


def stir(adapted: AdaptedSuffix) -> AdaptedSuffix:
    """Give every adapter values that change the features."""
    random = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=random)
            parameter.data += 0.1 * noise
    return adapted


@pytest.mark.parametrize("name", NETS)
def test_folding_leaves_no_batch_norm_and_the_same_features(name: str) -> None:
    """Equal but for float rounding, and layers keep the names that adapters are stored by."""
    backbone = lively(name)
    maps = maps_of(backbone)

    folded = fold(backbone.suffix)

    names = {n for n, m in backbone.suffix.named_modules() if isinstance(m, nn.Conv2d)}
    assert {n for n, m in folded.named_modules() if isinstance(m, nn.Conv2d)} == names
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(maps), backbone.suffix(maps), atol=1e-5, rtol=1e-5)


def test_folding_changes_nothing_of_what_it_copies() -> None:
    """Not the weights, and not the mode."""
    backbone = lively("small32").train()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}

    folded = fold(backbone.suffix)

    assert all(torch.equal(backbone.state_dict()[key], tensor) for key, tensor in before.items())
    assert backbone.suffix.training
    assert not folded.training


class Twice(nn.Module):
    """A convolution that more than its batch norm reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, 3, height, width] to features [batch, 4]."""
        raw = self.conv(maps)
        return (self.norm(raw) + raw).mean((2, 3))


class Branching(Twice):
    """What torch.fx cannot trace: Python decides by a tensor's value."""

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, 3, height, width] to features [batch, 4]."""
        return super().forward(maps if maps.sum() > 0 else -maps)


@pytest.mark.parametrize("suffix", [Twice(), Branching()])
def test_a_batch_norm_that_cannot_be_folded_stays(suffix: nn.Module) -> None:
    """Correct before fast."""
    backbone = enliven(tiny(suffix))
    maps = torch.rand(2, 3, 8, 8)

    folded = fold(backbone.suffix)

    assert any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(maps), backbone.suffix(maps))
    assert sites_of(backbone) == {"conv": Site(3, 4, is_pointwise=True)}


def test_sites_run_in_order_and_gates_are_left_out() -> None:
    """MobileNetV3: expand, depthwise and project of each block, then the last convolution."""
    sites = sites_of(lively("mobilenet_v3_small"))

    assert list(sites)[:4] == [
        "stage.9.block.0.0", "stage.9.block.1.0", "stage.9.block.3.0", "stage.10.block.0.0",
    ]  # fmt: skip
    assert sites["stage.9.block.0.0"] == Site(48, 288, is_pointwise=True)
    assert sites["stage.9.block.1.0"] == Site(288, 288, is_pointwise=False)
    assert len(sites) == 10
    assert not any("block.2" in name for name in sites)


def test_a_convolution_with_a_stride_or_a_subclass_is_not_pointwise() -> None:
    """Their outputs are no matrix product of each pixel of the map."""
    resnet = sites_of(lively("resnet18"))
    mine = sites_of(lively(MY_NET))

    assert not resnet["stage.layer4.0.downsample.0"].is_pointwise
    assert [site.is_pointwise for site in mine.values()] == [False, True, False, True]
    assert sites_of(tiny(Shifting())) == {"0": Site(3, 4, is_pointwise=False)}


def test_low_rank_where_there_is_no_matrix_is_an_error() -> None:
    """ResNet-18's last stage has 3x3 convolutions and one with a stride."""
    with pytest.raises(AdapterError, match=r"no layer for 'lora'.*'ssf', 'bias' or a tail"):
        adapt(lively("resnet18"), "lora", width=4, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETS)
def test_a_fresh_adapter_changes_no_bit(name: str, kind: AdapterKind) -> None:
    """Training starts from exactly the suffix that serving runs without an adapter."""
    backbone = lively(name)
    maps = maps_of(backbone)

    adapted = adapt(backbone, kind, width=3, seed=0)

    assert torch.equal(adapted(maps), fold(backbone.suffix)(maps))
    torch.testing.assert_close(adapted(maps), backbone.suffix(maps), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "ssf", "bias"])
@pytest.mark.parametrize("name", [*NETS, "tokens"])
def test_an_adapter_equals_its_merged_weights(name: str, kind: AdapterKind) -> None:
    """The adapter is a change of weights, computed beside them."""
    backbone = tiny(Tokens()) if name == "tokens" else lively(name)
    maps = maps_of(backbone)
    plain = fold(backbone.suffix)(maps)
    adapted = stir(adapt(backbone, kind, width=3, seed=0))

    features = merged(backbone, kind, adapted.weights())(maps)

    scale = float(plain.detach().abs().max())
    torch.testing.assert_close(adapted(maps), features, atol=1e-5 * scale, rtol=1e-5)
    assert float((features - plain).detach().abs().max()) > 1e-2 * scale


def test_a_parallel_adapter_cannot_be_merged() -> None:
    """Its ReLU is no matrix."""
    with pytest.raises(ValueError, match="ReLU, so it cannot be merged"):
        merged(lively("small32"), "adapter", {})


@pytest.mark.parametrize("is_linear", [True, False])
def test_low_rank_is_its_formula(*, is_linear: bool) -> None:
    """Pixel by pixel and row by row: y + up @ act(down @ x)."""
    conv, random = nn.Conv2d(5, 7, 1), torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 7)
    linear.load_state_dict({"weight": conv.weight[:, :, 0, 0], "bias": conv.bias})
    rows = torch.randn(2, 6, 5, generator=random)
    down, up = (torch.randn(shape, generator=random) for shape in ((3, 5), (7, 3)))
    outputs: list[Tensor] = []
    for layer, inputs in ((linear, rows), (conv, rows.transpose(1, 2).reshape(2, 5, 2, 3))):
        adapter = LowRank(layer, width=3, is_linear=is_linear)
        adapter.down.data, adapter.up.data = down, up
        outputs.append(adapter(inputs).reshape(2, *([7, 6] if layer is conv else [6, 7])))

    hidden = rows.numpy() @ down.numpy().T
    hidden = hidden if is_linear else hidden.clip(min=0)
    expected = F.linear(rows, linear.weight, linear.bias) + torch.from_numpy(hidden @ up.numpy().T)

    torch.testing.assert_close(outputs[0], expected)
    torch.testing.assert_close(outputs[1].transpose(1, 2), expected)


def test_scale_shift_is_its_formula() -> None:
    """Channel by channel: y * scale + shift."""
    conv, maps = nn.Conv2d(3, 2, 3), torch.rand(2, 3, 4, 4)
    adapter = ScaleShift(conv, learns_scale=True)
    adapter.scale.data, adapter.shift.data = torch.tensor([2.0, 0.5]), torch.tensor([0.0, -1.0])

    outputs = adapter(maps)

    torch.testing.assert_close(outputs[:, 0], 2 * conv(maps)[:, 0])
    torch.testing.assert_close(outputs[:, 1], 0.5 * conv(maps)[:, 1] - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_adapter_alone(kind: AdapterKind) -> None:
    """And a training step leaves every frozen value and statistic as it was, even in train()."""
    backbone = enliven(tiny(Branching()))  # its batch norm stays
    adapted = stir(adapt(backbone, kind, width=2, seed=0)).train()
    frozen = {
        key: tensor.clone()
        for key, tensor in adapted.state_dict().items()
        if key.rpartition(".")[2] not in ("up", "down", "scale", "shift")
    }
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)

    adapted(torch.rand(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()

    after = adapted.state_dict()
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == {
        f"suffix.conv.{name}"
        for name in {"ssf": ("scale", "shift"), "bias": ("shift",)}.get(kind, ("down", "up"))
    }
    assert all(torch.equal(after[key], tensor) for key, tensor in frozen.items())
    assert any("running_mean" in key for key in frozen)
    assert backbone.suffix.get_parameter("conv.weight").grad is None


def test_weights_are_named_by_site() -> None:
    """Shapes as the bank of the adapted graph takes them; bias brings scales of one."""
    backbone = lively("small32")
    sites = sites_of(backbone)

    lora = adapt(backbone, "lora", width=3, seed=0).weights()
    bias = stir(adapt(backbone, "bias", width=3, seed=0)).weights()

    pointwise = [name for name, site in sites.items() if site.is_pointwise]
    assert list(lora) == [f"{name}/{end}" for name in pointwise for end in ("down", "up")]
    assert list(bias) == [f"{name}/{end}" for name in sites for end in ("scale", "shift")]
    for name in pointwise:
        assert lora[f"{name}/down"].shape == (3, sites[name].in_channels)
        assert lora[f"{name}/up"].shape == (sites[name].out_channels, 3)
    for name, site in sites.items():
        assert torch.equal(bias[f"{name}/scale"], torch.ones(site.out_channels))
        assert bool(bias[f"{name}/shift"].any())


def test_the_seed_decides_where_low_rank_starts() -> None:
    """Same seed, same adapter; the global generator is left alone."""
    backbone, state = lively("small32"), torch.get_rng_state()
    first, again, other = (
        adapt(backbone, "lora", width=2, seed=seed).weights() for seed in (0, 0, 1)
    )

    key = "stage3.0.1.0/down"
    assert torch.equal(first[key], again[key])
    assert not torch.equal(first[key], other[key])
    assert torch.equal(torch.get_rng_state(), state)


class Shifting(nn.Sequential):
    """A 1x1 convolution of the user's own kind, which reads the pixel beside."""

    def __init__(self) -> None:
        super().__init__(self.Conv(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    class Conv(nn.Conv2d):
        """Shifts the map by a pixel."""

        @override
        def forward(self, input: Tensor) -> Tensor:
            """Maps [batch, 3, height, width] to maps [batch, 4, height, width]."""
            return super().forward(input.roll(1, dims=3))


class Tokens(nn.Module):
    """Linear layers on [batch, tokens, channels], then one on [batch, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(3, 6), nn.Linear(6, 5)

    @override
    def forward(self, maps: Tensor) -> Tensor:
        """Maps [batch, 3, height, width] to features [batch, 5]."""
        return self.out(F.gelu(self.mix(maps.flatten(2).transpose(1, 2))).mean(dim=1))


def tiny(suffix: nn.Module) -> Backbone:
    """A backbone whose prefix does nothing."""
    network = nn.ModuleDict({"prefix": nn.Identity(), "suffix": suffix})
    architecture = Architecture("tiny", network, network["prefix"], suffix, "suffix", TINY)
    return Backbone(architecture, reference="tiny").eval()
