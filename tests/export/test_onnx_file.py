"""Graphs are one quiet file without a trace of the machine that made them."""

from __future__ import annotations

import logging
import warnings

import onnx
import pytest
import torch
from google.protobuf.message import Message
from torch import nn
from typing_extensions import override

from export.onnx_file import EXAMPLE_ROWS, dynamic, graph_of


def graph(module: nn.Module, width: int = 8) -> bytes:
    """The graph of a module that takes rows of this width."""
    return graph_of(
        module.eval(),
        (torch.zeros(EXAMPLE_ROWS, width),),
        axes=({0: dynamic("rows")},),
        input_names=("features",),
        output_names=("logits",),
    )


def small_net() -> nn.Sequential:
    """A net with something to fold and something to leave out."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 4))


def notes_of(message: Message) -> list[str]:
    """Names of the fields that hold free text about a part's origin."""
    found: list[str] = []
    for field, value in message.ListFields():
        if field.name in {"doc_string", "metadata_props"}:
            found.append(field.full_name)
        elif field.message_type is not None:
            parts = [value] if isinstance(value, Message) else value
            found += [note for part in parts for note in notes_of(part)]
    return found


def test_the_exporter_itself_would_leave_notes() -> None:
    """The next test has something to find."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        program = torch.onnx.export(
            small_net().eval(), (torch.zeros(2, 8),), dynamo=True, verbose=False
        )

    assert program is not None
    assert notes_of(program.model_proto)


def test_no_part_of_a_graph_has_notes() -> None:
    """Neither stack traces nor documentation, at any depth."""
    assert notes_of(onnx.load_model_from_string(graph(small_net()))) == []


def test_a_graph_names_no_file_and_no_tool() -> None:
    """Searched in the raw bytes, where nothing can hide."""
    data = graph(small_net())

    for trace in (b".py", b"site-packages", b"File ", b"torch", b"/home", b"/root", b"/tmp"):
        assert trace not in data, trace


def test_exporting_prints_nothing(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Standard output belongs to the command line; warnings would be errors here."""
    graph(small_net())

    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_weights_are_in_the_file() -> None:
    """No second file is named, and every weight has its bytes."""
    model = onnx.load_model_from_string(graph(small_net()))

    assert all(not tensor.external_data for tensor in model.graph.initializer)
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) == 4 * (
        8 * 6 + 6 + 6 * 4 + 4
    )


def test_the_same_weights_give_the_same_bytes() -> None:
    """Of two modules made apart."""
    assert graph(small_net()) == graph(small_net())


def test_other_weights_give_other_bytes() -> None:
    """Also where a single one differs in its last bit."""
    net = small_net()
    first = graph(net)
    weight = net.get_parameter("0.bias")
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))

    assert graph(net) != first


def test_the_number_of_rows_is_free_and_named() -> None:
    """Only the first axis; the others are numbers."""
    model = onnx.load_model_from_string(graph(small_net()))

    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [["rows", 8], ["rows", 4]]


def test_normalising_needs_no_operators_that_compute_shapes() -> None:
    """`F.normalize` expands its norms; dividing broadcasts anyway."""

    class Normalise(nn.Module):
        @override
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(features, dim=-1)

    model = onnx.load_model_from_string(graph(Normalise()))

    assert [node.op_type for node in model.graph.node] == ["ReduceL2", "Clip", "Div"]
