"""Where backbones come from: our small nets, torchvision's, and a user's own file."""

import difflib
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from models import smallnet
from models.errors import LearningError
from models.pictures import Preprocessing
from models.vision_transformer import cut_transformer

SMALL_NETS: dict[str, Callable[[], tuple[nn.Sequential, nn.Sequential]]] = {
    "small32": smallnet.small32,
    "small32_teacher": smallnet.small32_teacher,
}

# Where the last stage begins: the layer that brings the map to 1/32 of the picture. SqueezeNet and
# VGG pool between stages, so the last one begins just after the pooling, on the smaller map. A
# transformer has no stages: the last quarter of its blocks.
TORCHVISION_CUTS = {
    **{f"resnet{depth}": "layer4" for depth in (18, 34, 50, 101, 152)},
    "mobilenet_v2": "features.14",
    "mobilenet_v3_small": "features.9",
    "mobilenet_v3_large": "features.13",
    **{f"efficientnet_b{size}": "features.6" for size in range(8)},
    "squeezenet1_0": "features.12",
    "squeezenet1_1": "features.9",
    "vgg11": "features.16",
    "vgg11_bn": "features.22",
    "vgg13": "features.20",
    "vgg13_bn": "features.28",
    "vgg16": "features.24",
    "vgg16_bn": "features.34",
    "vgg19": "features.28",
    "vgg19_bn": "features.40",
    "inception_v3": "Mixed_7a",
    **{f"vit_{size}": "encoder.layers.encoder_layer_9" for size in ("b_16", "b_32")},
    **{f"vit_{size}": "encoder.layers.encoder_layer_18" for size in ("l_16", "l_32")},
}
# The last layer before pooling, in networks whose children are not all in `features`.
_LAST_LAYERS = ("layer4", "Mixed_7c")


class BackboneError(LearningError):
    """A backbone is unknown or does not keep the contract of `Architecture`."""


@dataclass(frozen=True)
class Architecture:
    """A network and where it is cut; what a user's own `my_nets.py:function` returns.

    Args:
        name: Short name, shown in reports.
        network: The whole network, with the key names of its published weights.
        prefix: First part of `network`, float32 [batch, 3, size, size] -> maps.
        suffix: Second part of `network`, maps -> features float32 [batch, num_features].
        cut: Name of the layer at which the suffix begins.
        preprocessing: How pictures are made for it; mean and std in units of 0..255.
    """

    name: str
    network: nn.Module
    prefix: nn.Module
    suffix: nn.Module
    cut: str
    preprocessing: Preprocessing


def backbone_names() -> tuple[str, ...]:
    """Every name that a backbone can be built from."""
    return (*SMALL_NETS, *TORCHVISION_CUTS)


def find_architecture(reference: str) -> tuple[Architecture, str]:
    """The architecture, and the reference by which it can be built again from any folder.

    Raises:
        BackboneError: unknown name, or the user's function does not keep the contract.
    """
    if ":" in reference or reference.endswith(".py"):
        return _user_architecture(reference)
    if reference in SMALL_NETS:
        return _small_architecture(reference), reference
    if reference in TORCHVISION_CUTS:
        return _torchvision_architecture(reference), reference
    names = backbone_names()
    close = difflib.get_close_matches(reference, names, n=3, cutoff=0.4) or names
    raise BackboneError(
        f"There is no backbone {reference!r}; did you mean {', '.join(close)}? "
        "Your own is named path/to/my_nets.py:function."
    )


def torchvision_state(reference: str) -> dict[str, Tensor]:
    """Download torchvision's ImageNet weights, or take them from its cache.

    Raises:
        BackboneError: torchvision has none for this backbone.
    """
    if reference not in TORCHVISION_CUTS:
        raise BackboneError(
            f"torchvision publishes no weights for {reference}; name a .safetensors or .pth file."
        )
    return dict(_torchvision_weights(reference).get_state_dict(progress=False, check_hash=True))


def _small_architecture(name: str) -> Architecture:
    prefix, suffix = SMALL_NETS[name]()
    middle = (127.5, 127.5, 127.5)
    return Architecture(
        name=name,
        network=nn.Sequential(OrderedDict[str, nn.Module](prefix=prefix, suffix=suffix)),
        prefix=prefix,
        suffix=suffix,
        cut="stage3",
        preprocessing=Preprocessing(size_px=32, resize_px=32, mean=middle, std=middle),
    )


def _torchvision_architecture(name: str) -> Architecture:
    # Said for Inception, which else warns of a change to come; the others take no such argument.
    settings = {"init_weights": True} if name == "inception_v3" else {}
    network = torchvision.models.get_model(name, weights=None, **settings)
    cut = TORCHVISION_CUTS[name]
    prefix, suffix = cut_network(network, cut)
    return Architecture(name, network, prefix, suffix, cut, _torchvision_preprocessing(name))


def cut_network(network: nn.Module, cut: str) -> tuple[nn.Module, nn.Module]:
    """Prefix and suffix of one of torchvision's networks, which share its tensors."""
    if isinstance(network, VisionTransformer):
        names = list(dict(network.encoder.layers.named_children()))
        return cut_transformer(network, at=names.index(cut.rpartition(".")[2]))
    holder = network.get_submodule("features") if cut.startswith("features.") else network
    # A second classifier, of training only, hangs beside Inception's layers.
    layers = {key: layer for key, layer in holder.named_children() if key != "AuxLogits"}
    names = list(layers)
    at = names.index(cut.removeprefix("features."))
    # Where pooling and classifier follow the last layer they are left out; pooling is added below.
    end = next((names.index(last) + 1 for last in _LAST_LAYERS if last in names), len(names))
    suffix = nn.Sequential(
        OrderedDict[str, nn.Module](
            stage=nn.Sequential(OrderedDict((key, layers[key]) for key in names[at:end])),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    prefix = nn.Sequential(OrderedDict((key, layers[key]) for key in names[:at]))
    return prefix, suffix


def _torchvision_weights(name: str) -> torchvision.models.WeightsEnum:
    # V1 for all: the V2 recipes gain on ImageNet itself, but features trained with such losses
    # transfer worse when they are read linearly (Kornblith et al. 2021, arXiv:2010.16402).
    return torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]


def _torchvision_preprocessing(name: str) -> Preprocessing:
    recipe = _torchvision_weights(name).transforms()
    # Inception's weights are from another library: torchvision undoes ImageNet's normalisation in
    # the network's own `forward`, which a trunk does not have.
    is_inception = name == "inception_v3"
    mean, std = ((0.5,) * 3, (0.5,) * 3) if is_inception else (recipe.mean, recipe.std)
    red, green, blue = (255 * value for value in mean)
    red_std, green_std, blue_std = (255 * value for value in std)
    return Preprocessing(
        size_px=recipe.crop_size[0],
        resize_px=recipe.resize_size[0],
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )


def _user_architecture(reference: str) -> tuple[Architecture, str]:
    """Run the user's file and call the function."""
    file, _, function = reference.rpartition(":")
    path = Path(file).resolve()
    if not file.endswith(".py") or not function.isidentifier():
        raise BackboneError(f"{reference!r} is not of the form path/to/my_nets.py:function.")
    if not path.is_file():
        raise BackboneError(f"There is no file {path}, which should define {function}.")
    try:
        architecture = _call(path, function)
    except Exception as error:
        raise BackboneError(
            f"{reference} cannot be built: {type(error).__name__}: {error}. Expected a function "
            "without arguments that returns a models.backbones.Architecture."
        ) from error
    if not isinstance(architecture, Architecture):
        raise BackboneError(
            f"{reference} returned {type(architecture).__name__}; "
            "expected a models.backbones.Architecture."
        )
    return architecture, f"{path}:{function}"


def _call(path: Path, function: str) -> object:
    spec = importlib.util.spec_from_file_location(f"_headstock_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses in the user's file look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, function)()
