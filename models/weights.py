"""Published weights into a network, with an account of what fitted and what did not."""

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import LearningError

SUFFIXES = (".safetensors", ".pth", ".pt")
# Counts batches for a cumulative average that no network here uses; older files lack it.
_COUNTER = "num_batches_tracked"


class WeightsError(LearningError):
    """Weights cannot be read, or leave the trunk untrained."""


@dataclass(frozen=True)
class WeightsReport:
    """What came of loading weights.

    Args:
        source: File, or "torchvision", or "none".
        num_loaded: Tensors copied into the network.
        missing: Tensors of the trunk that the file lacks.
        wrong_shape: Tensors of the trunk whose shape differs ("key: file [..], network [..]").
        unexpected: Keys of the file that the network lacks.
        classifier: Tensors outside the trunk that were not loaded; the trunk does without them.
        trained_share: Share of the trunk's values that were loaded, 0 to 1.
    """

    source: str
    num_loaded: int
    missing: tuple[str, ...]
    wrong_shape: tuple[str, ...]
    unexpected: tuple[str, ...]
    classifier: tuple[str, ...]
    trained_share: float

    @property
    def is_trained(self) -> bool:
        """Whether every tensor of the trunk was loaded."""
        return self.source != "none" and not self.missing and not self.wrong_shape

    def __str__(self) -> str:
        parts = [f"weights {self.source}: {self.trained_share:.1%} of the trunk loaded"]
        for what, keys in (
            ("missing", self.missing),
            ("of another shape", self.wrong_shape),
            ("unexpected", self.unexpected),
            ("outside the trunk and not needed", self.classifier),
        ):
            if keys:
                parts.append(f"{len(keys)} {what} ({_some(keys)})")
        return "; ".join(parts)


def load_weights(
    network: nn.Module, trunk: nn.Module, state: dict[str, Tensor], *, source: str
) -> WeightsReport:
    """Copy every tensor of `state` that fits into `network`.

    Args:
        trunk: The part of `network` that is kept; what it does not hold is the classifier.
        state: Key -> tensor, with the key names of the network.

    Returns:
        The account; whether an incomplete one is acceptable is the caller's question.

    Raises:
        WeightsError: a tensor of the trunk holds NaN or infinity.
    """
    own = network.state_dict(keep_vars=True)
    in_trunk = {id(tensor) for tensor in trunk.state_dict(keep_vars=True).values()}
    missing: list[str] = []
    wrong_shape: list[str] = []
    classifier: list[str] = []
    loaded: list[str] = []
    for key, tensor in own.items():
        is_trunk = id(tensor) in in_trunk
        if key in state and state[key].shape == tensor.shape:
            _copy(key, state[key], tensor)
            loaded.append(key)
        elif key.endswith(_COUNTER):
            continue
        elif not is_trunk:
            classifier.append(key)
        elif key in state:
            shapes = f"file {list(state[key].shape)}, network {list(tensor.shape)}"
            wrong_shape.append(f"{key}: {shapes}")
        else:
            missing.append(key)
    sizes = {
        key: tensor.numel()
        for key, tensor in own.items()
        if id(tensor) in in_trunk and not key.endswith(_COUNTER)
    }
    return WeightsReport(
        source=source,
        num_loaded=len(loaded),
        missing=tuple(missing),
        wrong_shape=tuple(wrong_shape),
        unexpected=tuple(key for key in state if key not in own),
        classifier=tuple(classifier),
        trained_share=sum(sizes.get(key, 0) for key in loaded) / max(1, sum(sizes.values())),
    )


def no_weights(trunk: nn.Module) -> WeightsReport:
    """The account of a trunk that starts from random values."""
    keys = tuple(key for key in trunk.state_dict() if not key.endswith(_COUNTER))
    return WeightsReport("none", 0, keys, (), (), (), 0.0)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors`, or from `.pth` / `.pt` without running pickled code.

    Raises:
        WeightsError: no such file, an unknown format, damaged, or not a state dict.
    """
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"Weights {path} have no known ending; expected {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise WeightsError(f"There are no weights at {path}; check the path.")
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(
            f"Weights {path} cannot be read ({first_line}); expected a state dict of tensors only. "
            "A file with pickled code is refused: save `network.state_dict()` as .safetensors."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(
            f"Weights {path} are not a plain state dict (key -> tensor); "
            "save `network.state_dict()` alone."
        )
    return state


def check_trained(report: WeightsReport, *, reference: str) -> None:
    """Refuse a trunk that would run with random values in it.

    A single missing layer is enough to make features worthless, and nothing else would show it.

    Raises:
        WeightsError: a tensor of the trunk was not loaded.
    """
    if report.is_trained:
        return
    if report.source == "none":
        raise WeightsError(
            f"{reference} would start from random weights; expected a weights file or "
            "'torchvision'. To train from random values, ask for the strategy scratch."
        )
    raise WeightsError(
        f"The trunk of {reference} would stay untrained in part: {report}. Expected every key of "
        "the trunk in the file; check that file and backbone belong together."
    )


def _copy(key: str, value: Tensor, tensor: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise WeightsError(f"Weights hold NaN or infinity in {key}; the file is damaged.")
    with torch.no_grad():
        tensor.copy_(value)


def _some(keys: tuple[str, ...]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")  # noqa: PLR2004
