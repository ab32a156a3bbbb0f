"""Modules to ONNX: one file, the same bytes every time, with nothing of the machine in it."""

import warnings
from collections.abc import Sequence
from typing import cast

import onnx
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from google.protobuf.message import Message
from onnxscript import ir
from onnxscript.rewriter.rules.common import expand_before_binary_op_rules
from torch import Tensor, nn

OPSET = 20
# Tracing takes 0 and 1 for constants, so an example of a free number of rows has to have more.
EXAMPLE_ROWS = 2


def graph_of(
    module: nn.Module, example: Tensor, *, rows: str, input_name: str, output_names: Sequence[str]
) -> bytes:
    """Trace a module of one input into an ONNX file that needs no other.

    Args:
        module: In evaluation mode, on the CPU.
        example: An input with `EXAMPLE_ROWS` rows.
        rows: Name of the first axis of input and outputs, which may have any length.

    Returns:
        The file's bytes: a function of the module's weights and operations alone.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # torch.export copies tree specifications of a class that torch itself deprecates.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=list(output_names),
            dynamic_shapes=({0: torch.export.Dim(rows)},),
            verbose=False,
        )
    assert program is not None
    model = ir.to_proto(_simplified(program.model))
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    # Maps have no order of their own in a protobuf file.
    return model.SerializeToString(deterministic=True)


def _simplified(model: ir.Model) -> ir.Model:
    """Drop what tracing leaves over: `expand_as` before an operator that broadcasts anyway."""
    onnxscript.rewriter.rewrite(model, expand_before_binary_op_rules)
    onnxscript.optimizer.optimize(model)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Remove file names, stack traces, versions, and shapes that any reader can infer."""
    for field in ("producer_name", "producer_version", "domain", "model_version"):
        model.ClearField(field)
    model.graph.name = "headstock"
    del model.graph.value_info[:]
    _clear_notes(model)


def _clear_notes(message: Message) -> None:
    for field, value in message.ListFields():
        if field.name in {"doc_string", "metadata_props"}:
            message.ClearField(field.name)
        elif isinstance(value, Message):
            _clear_notes(value)
        elif field.message_type is not None:
            for part in cast("Sequence[Message]", value):
                _clear_notes(part)
