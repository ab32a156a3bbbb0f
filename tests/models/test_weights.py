"""Specification of models/weights.py: published weights into a network."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.weights import (
    WeightsError,
    check_trained,
    load_weights,
    no_weights,
    read_state,
)


class Net(nn.Module):
    """A trunk and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict[str, nn.Module](conv=nn.Conv2d(3, 2, 1), bn=nn.BatchNorm2d(2))
        )
        self.classifier = nn.Linear(2, 5)


def filled(value: float) -> dict[str, torch.Tensor]:
    return {key: torch.full_like(tensor, value) for key, tensor in Net().state_dict().items()}


def test_every_tensor_is_copied() -> None:
    """A complete file leaves nothing of the random start, running statistics included."""
    net = Net()

    report = load_weights(net, net.trunk, filled(2), source="file")

    assert all(bool((tensor == 2).all()) for tensor in net.state_dict().values())
    assert (report.num_loaded, report.trained_share, report.is_trained) == (9, 1.0, True)
    check_trained(report, reference="net")


def test_a_missing_or_foreign_classifier_is_fine_and_said() -> None:
    """The trunk does without it."""
    net, state = Net(), filled(2)
    state["classifier.weight"] = torch.zeros(1000, 2)
    del state["classifier.bias"]

    report = load_weights(net, net.trunk, state, source="file")

    check_trained(report, reference="net")
    assert report.classifier == ("classifier.weight", "classifier.bias")
    assert "2 outside the trunk and not needed (classifier.weight, classifier.bias)" in str(report)


def test_a_key_that_the_network_lacks_is_reported() -> None:
    """Unexpected keys are no error: a file may hold more than is needed."""
    net = Net()

    report = load_weights(net, net.trunk, filled(2) | {"head.0": torch.zeros(1)}, source="file")

    check_trained(report, reference="net")
    assert report.unexpected == ("head.0",)


def test_missing_running_statistics_are_an_error() -> None:
    """They are few values, and without them every feature is wrong."""
    net, state = Net(), filled(2)
    del state["trunk.bn.running_var"]

    report = load_weights(net, net.trunk, state, source="file.pth")

    assert report.missing == ("trunk.bn.running_var",)
    with pytest.raises(WeightsError, match=r"net would stay untrained in part.*running_var"):
        check_trained(report, reference="net")


def test_a_wrong_shape_names_both_shapes() -> None:
    """So that one sees at once that it is another width of the network."""
    net, state = Net(), filled(2)
    state["trunk.conv.weight"] = torch.zeros(4, 3, 1, 1)

    report = load_weights(net, net.trunk, state, source="file")

    assert report.wrong_shape == ("trunk.conv.weight: file [4, 3, 1, 1], network [2, 3, 1, 1]",)
    assert report.trained_share == pytest.approx(10 / 16)
    assert not report.is_trained


def test_an_older_file_without_batch_counters_is_complete() -> None:
    """`num_batches_tracked` came with PyTorch 0.4.1 and changes no feature."""
    net, state = Net(), filled(2)
    del state["trunk.bn.num_batches_tracked"]

    assert load_weights(net, net.trunk, state, source="file").is_trained


def test_nan_weights_are_refused() -> None:
    """One NaN spreads to every feature."""
    net, state = Net(), filled(2)
    state["trunk.conv.bias"][0] = float("nan")

    with pytest.raises(WeightsError, match=r"NaN or infinity in trunk\.conv\.bias"):
        load_weights(net, net.trunk, state, source="file")


def test_no_weights_are_an_error_that_says_how_to_go_on() -> None:
    """A random trunk is accepted only on purpose."""
    with pytest.raises(WeightsError, match="random weights; expected a weights file"):
        check_trained(no_weights(Net().trunk), reference="net")


def test_both_file_formats_are_read(tmp_path: Path) -> None:
    """.safetensors and .pth give the same state dict."""
    save_file(filled(3), tmp_path / "a.safetensors")
    torch.save(filled(3), tmp_path / "a.pth")

    first, second = read_state(tmp_path / "a.safetensors"), read_state(tmp_path / "a.pth")

    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    """A whole pickled module could run anything while it loads."""
    torch.save(Net(), tmp_path / "whole.pth")

    with pytest.raises(WeightsError, match="pickled code is refused"):
        read_state(tmp_path / "whole.pth")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_damaged_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    """Not a traceback of the parser."""
    (tmp_path / name).write_bytes(b"not weights at all")

    with pytest.raises(WeightsError, match=f"{name} cannot be read"):
        read_state(tmp_path / name)


def test_a_training_checkpoint_is_no_state_dict(tmp_path: Path) -> None:
    """Nested dictionaries are common; the message says what to save instead."""
    torch.save({"epoch": 3, "model": filled(1)}, tmp_path / "c.pth")

    with pytest.raises(WeightsError, match="not a plain state dict"):
        read_state(tmp_path / "c.pth")


@pytest.mark.parametrize(
    ("name", "message"), [("absent.pth", "no weights at"), ("w.h5", "no known ending")]
)
def test_a_wrong_path_is_named(name: str, message: str, tmp_path: Path) -> None:
    """Missing files and unknown formats are told apart."""
    with pytest.raises(WeightsError, match=message):
        read_state(tmp_path / name)
