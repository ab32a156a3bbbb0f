"""Specification of models/backbones.py and models/architectures.py: pictures to features."""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from models.architectures import SMALL_NETS, TORCHVISION_CUTS, cut_network, find_architecture
from models.backbones import BackboneError, backbone_names, build_backbone
from models.folders import load_folder
from models.smallnet import small32, small32_teacher
from models.train_head import train_head
from models.weights import WeightsError

MY_NETS = Path(__file__).parents[1] / "end_to_end" / "my_nets.py"
# Large ones are left to the others of their family: they differ in widths and depths only.
QUICK = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
QUICK += ("efficientnet_b0", "squeezenet1_0", "squeezenet1_1")


def pictures(size_px: int, *, num: int = 2) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, size_px, size_px, 3), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize("name", QUICK)
def test_features_are_what_the_networks_own_classifier_reads(name: str) -> None:
    """Prefix and suffix together are torchvision's network up to its classifier."""
    backbone, _ = build_backbone(name, weights=None, allow_untrained=True)
    network = torchvision.models.get_model(name, weights=None).eval()
    layers = dict(network.named_children())
    copy_trunk(backbone, network, cut=TORCHVISION_CUTS[name])
    seen: list[Tensor] = []
    last = layers["fc"] if "fc" in layers else layers["classifier"]

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    last.register_forward_pre_hook(keep)
    images = pictures(96)  # Convolutions do not mind, and it takes a fraction of the time.

    with torch.no_grad():
        features = backbone(images)
        network(backbone.normalise(images))

    # SqueezeNet pools after its classifier, which is a convolution.
    expected = seen[0].mean((2, 3)) if seen[0].ndim == 4 else seen[0]
    torch.testing.assert_close(features, expected)
    assert features.shape == (2, backbone.num_features)


def copy_trunk(backbone: nn.Module, network: nn.Module, *, cut: str) -> None:
    """Give torchvision's own network the values of the backbone, by its key names."""
    holder = network.get_submodule("features") if cut.startswith("features.") else network
    state = {
        key.removeprefix("prefix.").removeprefix("suffix.stage."): tensor
        for key, tensor in backbone.state_dict().items()
    }
    _, unexpected = holder.load_state_dict(state, strict=False)
    assert not unexpected


@pytest.mark.parametrize("name", [name for name in TORCHVISION_CUTS if "vgg" in name])
def test_vgg_is_cut_behind_its_fourth_pooling(name: str) -> None:
    """Prefix and last stage are all of its layers, in order."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    prefix, suffix = cut_network(network, TORCHVISION_CUTS[name])
    stage = suffix.get_submodule("stage")

    layers = [*prefix.children(), *stage.children()]
    assert all(
        one is other
        for one, other in zip(layers, network.get_submodule("features").children(), strict=True)
    )
    pools = [isinstance(layer, nn.MaxPool2d) for layer in layers]
    assert sum(pools[: len(list(prefix.children()))]) == 4
    assert isinstance(list(prefix.children())[-1], nn.MaxPool2d)
    assert (sum(pools), pools[-1]) == (5, True)


def test_inception_takes_pictures_as_its_own_forward_does() -> None:
    """That undoes ImageNet's normalisation, for weights which came from another library."""
    architecture, _ = find_architecture("inception_v3")
    preprocessing, network = architecture.preprocessing, architecture.network
    vars(network)["transform_input"] = True
    images = pictures(20).permute(0, 3, 1, 2) / 255
    imagenet = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, :, None, None]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    expected = vars(type(network))["_transform_input"](
        network, (images - imagenet[0]) / imagenet[1]
    )

    torch.testing.assert_close((255 * images - mean) / std, expected)
    assert (preprocessing.size_px, preprocessing.resize_px) == (299, 342)


def test_inceptions_features_are_what_its_classifier_reads() -> None:
    """Without the second classifier, which is for training only."""
    architecture, _ = find_architecture("inception_v3")
    network = architecture.network
    network.register_module("fc", nn.Identity())
    for module in network.modules():
        # With the statistics that it starts with, random layers make values of a million.
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    images = pictures(96).permute(0, 3, 1, 2) / 128 - 1

    with torch.no_grad():
        architecture.suffix.train()(architecture.prefix.train()(images))
        expected = network.eval()(images)
        features = architecture.suffix.eval()(architecture.prefix.eval()(images))

    torch.testing.assert_close(features, expected)
    assert (features.shape, architecture.cut) == ((2, 2048), "Mixed_7a")
    assert not any("AuxLogits" in key for key in architecture.suffix.state_dict())


def test_a_transformer_is_cut_between_blocks() -> None:
    """Prefix and suffix together are torchvision's network up to its classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VisionTransformer(32, 8, 4, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    prefix, suffix = cut_network(network, "encoder.layers.encoder_layer_3")
    network.register_module("heads", nn.Identity())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        tokens = prefix.eval()(images)
        torch.testing.assert_close(suffix.eval()(tokens), network(images))

    assert tokens.shape == (2, 17, 16)
    assert len(list(suffix.get_submodule("blocks").children())) == 1


@pytest.mark.parametrize("name", [name for name in TORCHVISION_CUTS if "vit" in name])
def test_the_last_quarter_of_a_transformer_is_its_suffix(name: str) -> None:
    """It has no stages."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    prefix, suffix = cut_network(network, TORCHVISION_CUTS[name])

    depths = [len(list(part.get_submodule("blocks").children())) for part in (prefix, suffix)]
    assert depths[0] == 3 * depths[1]


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet152", "efficientnet_b2"])
def test_larger_networks_are_cut_at_a_layer_that_they_have(name: str) -> None:
    """The declared cut is a submodule of torchvision's network."""
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)

    network.get_submodule(TORCHVISION_CUTS[name])


def test_mobilenet_v3_small_has_576_features() -> None:
    """Pooled before its classifier's hidden layer."""
    backbone, _ = build_backbone("mobilenet_v3_small", weights=None, allow_untrained=True)

    assert (backbone.num_features, backbone.cut) == (576, "features.9")


def test_preprocessing_is_that_of_the_published_weights() -> None:
    """ImageNet's means, in units of 0..255, and 224 px out of 256."""
    backbone, _ = build_backbone("mobilenet_v2", weights=None, allow_untrained=True)
    preprocessing = backbone.preprocessing

    assert (preprocessing.size_px, preprocessing.resize_px) == (224, 256)
    assert preprocessing.mean == pytest.approx((123.675, 116.28, 103.53))
    assert preprocessing.std == pytest.approx((58.395, 57.12, 57.375))


def test_normalise_subtracts_and_divides_each_channel() -> None:
    """uint8 [batch, height, width, 3] becomes float32 [batch, 3, height, width]."""
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 32, 32, 3)

    normalised = backbone.normalise(images)

    assert normalised.shape == (1, 3, 32, 32)
    torch.testing.assert_close(normalised[0, :, 5, 7], torch.tensor([-1.0, -0.6, 1.0]))


@pytest.mark.parametrize("name", ["small32", "squeezenet1_1"])
def test_a_state_dict_has_the_keys_of_prefix_and_suffix_only(name: str) -> None:
    """Mean and std belong to the preprocessing, not to the weights."""
    backbone, _ = build_backbone(name, weights=None, allow_untrained=True)

    assert {key.split(".")[0] for key in backbone.state_dict()} == {"prefix", "suffix"}


def test_the_small_student_is_at_least_five_times_smaller_than_its_teacher() -> None:
    """The promise of the demo."""
    sizes = [
        sum(p.numel() for part in build() for p in part.parameters())
        for build in (small32_teacher, small32)
    ]

    assert sizes[0] >= 5 * sizes[1]
    assert set(SMALL_NETS) == {"small32", "small32_teacher"}


def test_the_last_stage_of_the_student_has_pointwise_convolutions() -> None:
    """Low-rank adapters on 1x1 convolutions are what a mixed batch can afford."""
    _, suffix = small32()

    kernels = [m.kernel_size for m in suffix.modules() if isinstance(m, nn.Conv2d)]

    assert kernels.count((1, 1)) == 2


def test_random_values_depend_on_the_seed_alone() -> None:
    """Same seed, same start, whatever was drawn before; and the caller's generator is left be."""
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=1)
    other, _ = build_backbone("small32", weights=None, allow_untrained=True, seed=2)

    images = pictures(32)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))


def test_an_unknown_name_gives_the_closest() -> None:
    """A slip of the finger is answered with what was meant."""
    with pytest.raises(
        BackboneError, match=r"no backbone 'mobilnet_v2'; did you mean mobilenet_v2"
    ):
        build_backbone("mobilnet_v2", weights=None)


def test_random_weights_have_to_be_asked_for() -> None:
    """A trunk that was forgotten to be loaded would train heads on noise."""
    with pytest.raises(WeightsError, match="small32 would start from random weights"):
        build_backbone("small32", weights=None)


def test_torchvision_has_no_weights_for_other_networks() -> None:
    """Said before anything is downloaded."""
    with pytest.raises(BackboneError, match="publishes no weights for small32"):
        build_backbone("small32", weights="torchvision")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    """Nothing fits, and the message counts what does not."""
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "s.pth")

    with pytest.raises(WeightsError, match=r"0\.0% of the trunk loaded; 100 missing"):
        build_backbone("resnet18", weights=tmp_path / "s.pth")


def test_weights_without_a_classifier_load(tmp_path: Path) -> None:
    """Published trunks often come without one."""
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    trunk = {key: tensor for key, tensor in state.items() if key.startswith("features.")}
    torch.save(trunk, tmp_path / "trunk.pth")

    backbone, report = build_backbone("squeezenet1_1", weights=tmp_path / "trunk.pth")

    assert report.classifier == ("classifier.1.weight", "classifier.1.bias")
    assert torch.equal(backbone.state_dict()["prefix.0.weight"], trunk["features.0.weight"])


def test_a_users_own_network_is_built_by_its_path() -> None:
    """The reference that is kept is absolute, so that it holds from any folder."""
    backbone, _ = build_backbone(f"{MY_NETS}:mobilenet_v1_025", weights=None, allow_untrained=True)

    assert backbone.reference == f"{MY_NETS}:mobilenet_v1_025"
    assert (backbone.num_features, backbone.preprocessing.size_px) == (256, 128)


USER_FILE = """
from torch import nn
from models.backbones import Architecture
from models.pictures import Preprocessing

SQUARE = Preprocessing(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

def unpooled():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1))
    return Architecture("unpooled", net, net[:1], net[1:], "1", SQUARE)

def foreign():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    return Architecture("foreign", nn.Linear(1, 1), net[:1], net[1:], "1", SQUARE)

def broken():
    net = nn.Sequential(nn.Conv2d(5, 2, 1), nn.Flatten())
    return Architecture("broken", net, net[:1], net[1:], "1", SQUARE)

def nothing():
    return None

def raising():
    raise RuntimeError("no such layer")
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "unpooled",
            r"gives torch.float32 \[1, 2, 8, 8\]; expected float32 \[batch, num_features\]",
        ),
        ("foreign", "prefix.0.weight is no part of `network`"),
        ("broken", "fails on a picture of 8 px"),
        ("nothing", "returned NoneType; expected a models.backbones.Architecture"),
        ("raising", "RuntimeError: no such layer"),
        ("absent", "has no attribute 'absent'"),
    ],
)
def test_a_users_network_that_breaks_the_contract_is_told_how(
    function: str, message: str, tmp_path: Path
) -> None:
    """Each fault of a user's file has its own message, when the backbone is built."""
    (tmp_path / "nets.py").write_text(USER_FILE)

    with pytest.raises(BackboneError, match=message):
        build_backbone(f"{tmp_path}/nets.py:{function}", weights=None, allow_untrained=True)


@pytest.mark.parametrize(
    ("reference", "message"),
    [("absent.py:net", "no file"), ("nets.py", "not of the form"), ("nets.py:a b", "not of the")],
)
def test_a_reference_that_names_no_function_is_refused(reference: str, message: str) -> None:
    """Said before any file is run."""
    with pytest.raises(BackboneError, match=message):
        build_backbone(reference, weights=None)


def test_all_names_are_listed() -> None:
    """What help texts print."""
    assert {"small32", "resnet50", "efficientnet_b7", "vit_b_16"} <= set(backbone_names())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "file", "accuracy"),
    [
        # The probe of the data's own description is .74-.77; a quarter of the width gets .57.
        ("mobilenet_v2", "mobilenet_v2_imagenet_trunk_rebn.pth", 0.70),
        ("squeezenet1_1", "squeezenet1_1_imagenet.pth", 0.60),
        (f"{MY_NETS}:mobilenet_v1_025", "mobilenet_v1_0.25_128_tfpad_rebn.pth", 0.51),
        (f"{MY_NETS}:mobilenet_v1_05", "mobilenet_v1_0.5_160_tfpad_rebn.pth", 0.65),
    ],
)
def test_published_weights_load_completely_and_mean_what_they_did(
    shared: Path, reference: str, file: str, accuracy: float
) -> None:
    """Every key of the trunk fits, and a linear head on its features tells garments apart."""
    backbone, report = build_backbone(reference, weights=shared / "weights" / file)
    data = load_folder(shared / "data" / "clothing10", seed=0)

    head = train_head(backbone, data, kind="linear")

    assert (report.trained_share, report.unexpected, report.missing) == (1.0, (), ())
    assert head.metrics["test"].value >= accuracy
