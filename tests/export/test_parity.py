"""A graph is compared with PyTorch before anything of it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from export.bundle import TRUNK_GRAPH
from export.head import export_head
from export.parity import (
    PARITY_TOLERANCE,
    ParityError,
    compare,
    head_parity,
    trunk_parity,
)
from export.trunk import TrunkReport
from models.backbones import Backbone
from models.heads import LinearHead
from models.progress import Progress

ROWS = np.array([[1.0, -4.0, 2.0], [0.5, 0.25, 0.0]], dtype=np.float32)


@pytest.fixture
def graph(trunk: TrunkReport, trunk_folder: Path) -> bytes:
    """A good trunk's graph."""
    assert trunk.graph_bytes
    return (trunk_folder / TRUNK_GRAPH).read_bytes()


def edit_weights(
    graph: bytes, ending: str, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> bytes:
    """The graph with every weight whose name ends so changed."""
    model = onnx.load_model_from_string(graph)
    found = [tensor for tensor in model.graph.initializer if tensor.name.endswith(ending)]
    assert found
    for tensor in found:
        values = np.ascontiguousarray(change(numpy_helper.to_array(tensor)))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model.SerializeToString()


def edit_nodes(graph: bytes, op_type: str, change: Callable[[onnx.NodeProto], None]) -> bytes:
    """The graph with every node of this type changed."""
    model = onnx.load_model_from_string(graph)
    nodes = [node for node in model.graph.node if node.op_type == op_type]
    assert nodes
    for node in nodes:
        change(node)
    return model.SerializeToString()


# Comparing


def test_differences_are_measured_against_the_outputs_scale() -> None:
    """The largest value is 4, so a difference of 0.0002 is 0.00005 of it."""
    found = ROWS + np.array([[0, 0, 0], [0, 0, 0.0002]], dtype=np.float32)

    parity = compare("features", ROWS, found, tolerance=1e-4)
    assert parity.num_pictures == 2
    assert parity.largest_absolute == pytest.approx(0.0002, rel=1e-3)
    assert parity.largest_relative == pytest.approx(0.00005, rel=1e-3)


def test_a_difference_beyond_the_tolerance_is_refused() -> None:
    """The message has both numbers and says what was not done."""
    found = ROWS + np.float32(0.01)

    with pytest.raises(ParityError, match=r"features differ by 1\.00e-02.*Nothing was written"):
        compare("features", ROWS, found, tolerance=1e-4)


def test_agreement_is_the_share_of_rows_with_the_same_largest_value() -> None:
    """One row of two changes its largest."""
    found = np.array([[1.0, -4.0, 2.0], [0.5, 0.75, 0.0]], dtype=np.float32)

    assert compare("logits", ROWS, found, tolerance=1.0).argmax_agreement == 0.5
    assert compare("logits", ROWS, ROWS, tolerance=1.0).argmax_agreement == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_on_either_side(value: float) -> None:
    """NaN compares as neither more nor less; it must not pass."""
    broken = ROWS.copy()
    broken[1, 1] = value

    with pytest.raises(ParityError, match="differ by"):
        compare("features", ROWS, broken, tolerance=1e-4)
    with pytest.raises(ParityError, match="not finite on these pictures"):
        compare("features", broken, ROWS, tolerance=1e-4)


def test_another_shape_is_refused() -> None:
    """Rather than broadcast."""
    with pytest.raises(ParityError, match=r"of shape \[1, 3\], PyTorch \[2, 3\]"):
        compare("features", ROWS, ROWS[:1], tolerance=1.0)


def test_outputs_that_are_all_zero_agree() -> None:
    """An untrained linear head."""
    zeros = np.zeros((2, 3), dtype=np.float32)

    assert compare("logits", zeros, zeros, tolerance=1e-4).largest_relative == 0.0


# Trunks


def test_a_good_trunk_is_far_inside_the_tolerance(
    student: Backbone, graph: bytes, pictures: Tensor
) -> None:
    """Float rounding leaves a factor of ten, so that other machines pass too."""
    parity = trunk_parity(student, graph, pictures)

    assert set(parity) == {"features", "prefix"}
    for output in parity.values():
        assert output.num_pictures == len(pictures)
        assert output.largest_relative < PARITY_TOLERANCE / 10
    assert parity["features"].argmax_agreement == 1.0


def swap_colours(graph: bytes) -> bytes:
    """Blue, green, red."""
    return edit_weights(graph, "prefix.stem.0.weight", lambda weights: weights[:, ::-1])


def shift_mean(graph: bytes) -> bytes:
    """Another normalisation (here mean and std are one tensor)."""
    return edit_weights(graph, "mean", lambda mean: mean + 2)


def nudge_some_weights(graph: bytes) -> bytes:
    """One weight in two hundred of the last layer."""

    def nudge(weights: NDArray[np.float32]) -> NDArray[np.float32]:
        nudged = weights.copy()
        nudged.reshape(-1)[::200] += 0.05
        return nudged

    return edit_weights(graph, "suffix.stage3.1.body.1.0.weight", nudge)


def pad_right_and_bottom(graph: bytes) -> bytes:
    """The padding of other frameworks: same sizes, other pictures."""

    def pad(node: onnx.NodeProto) -> None:
        for attribute in node.attribute:
            if attribute.name == "pads" and list(attribute.ints) == [1, 1, 1, 1]:
                attribute.ints[:] = [0, 0, 2, 2]

    return edit_nodes(graph, "Conv", pad)


def forget_activations(graph: bytes) -> bytes:
    """Affine all through."""

    def forget(node: onnx.NodeProto) -> None:
        node.op_type = "Identity"

    return edit_nodes(graph, "Relu", forget)


@pytest.mark.parametrize(
    "corrupt",
    [swap_colours, shift_mean, nudge_some_weights, pad_right_and_bottom, forget_activations],
)
def test_a_corrupted_trunk_is_refused(
    student: Backbone, graph: bytes, pictures: Tensor, corrupt: Callable[[bytes], bytes]
) -> None:
    """What really goes wrong in exports, each far beyond rounding."""
    with pytest.raises(ParityError, match="is not what was trained"):
        trunk_parity(student, corrupt(graph), pictures)


def test_a_trunk_that_takes_one_batch_size_is_refused(
    student: Backbone, graph: bytes, pictures: Tensor
) -> None:
    """Pictures are shown in batches of 1, 2, 4, ..."""
    model = onnx.load_model_from_string(graph)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    with pytest.raises(ParityError, match="cannot run"):
        trunk_parity(student, model.SerializeToString(), pictures)


def test_bytes_that_are_no_graph_are_refused(student: Backbone, pictures: Tensor) -> None:
    """ONNX Runtime's own reason is in the message."""
    with pytest.raises(ParityError, match="ONNX Runtime cannot load the exported graph"):
        trunk_parity(student, b"not a graph", pictures)


def test_progress_counts_pictures(student: Backbone, graph: bytes, pictures: Tensor) -> None:
    """Up to the last, in the batches that were shown."""
    steps: list[Progress] = []
    trunk_parity(student, graph, pictures, progress=steps.append)

    assert [step.done for step in steps] == [1, 3, 7, 15, 31, 40]
    assert {step.total for step in steps} == {40}


# Heads


def test_a_head_with_other_weights_is_refused() -> None:
    """The graph of one head is not that of another."""
    head, other = LinearHead(8, 3), LinearHead(8, 3)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(other.weight, generator=torch.Generator().manual_seed(1))
    features = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)

    graph = export_head(head.eval(), num_features=8)
    assert head_parity(head, graph, features).num_pictures == 5
    with pytest.raises(ParityError, match="logits differ"):
        head_parity(other, graph, features)
