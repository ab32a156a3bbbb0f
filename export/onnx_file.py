"""Modules to ONNX: one file, the same bytes every time, with nothing of the machine in it."""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import onnx
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from google.protobuf.message import Message
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxscript import ir
from onnxscript.rewriter.rules.common import expand_before_binary_op_rules
from torch import Tensor, nn

OPSET = 20
# Tracing takes 0 and 1 for constants, so an example of a free number of rows has to have more.
EXAMPLE_ROWS = 2
MAX_COMPARED = 2**31  # elements of a weight that may be the twin of another


dynamic = torch.export.Dim  # an axis of any length, by its name


def graph_of(
    module: nn.Module,
    examples: tuple[Tensor, ...],
    *,
    axes: tuple[Any, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> bytes:
    """Trace a module into an ONNX file that needs no other.

    Args:
        module: In evaluation mode, on the CPU.
        examples: Its inputs; an axis of any length is at least `EXAMPLE_ROWS` long in them.
        axes: For each argument of `forward`, its axes of any length: place -> `dynamic(name)`.

    Returns:
        The file's bytes: a function of the module's weights and operations alone.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # torch.export copies tree specifications of a class that torch itself deprecates.
        # Two axes of one name are what is meant.
        warnings.filterwarnings("ignore", r"# The axis name:", UserWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=axes,
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
    # Two families of adapters share the weights of one suffix.
    DeduplicateInitializersPass(size_limit=MAX_COMPARED)(model)
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
