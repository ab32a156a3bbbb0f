"""A bank's slots in the memory of a device, where a slot is written without moving the others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper
from onnxruntime import OrtValue

from serve.onnx_session import Device, open_session

SLOT = "slot"


class DeviceArrays:
    """Room for slots on a device, all of it taken at once; otherwise as `BankArrays`.

    ONNX Runtime has only copies of whole tensors for a device. So a small graph scatters one slot's
    values into each tensor, bound as input and as output of the same run: its kernels copy a
    tensor only if the output is elsewhere.

    Args:
        shapes: What one slot holds, by the graph's input.
        num_slots: So many from the start.
    """

    grows = False

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], num_slots: int, device: Device
    ) -> None:
        self.arrays = {
            name: OrtValue.ortvalue_from_shape_and_type((num_slots, *shape), np.float32, device)
            for name, shape in shapes.items()
        }
        self._writer = open_session(_scatter(shapes, num_slots), device)

    def write(self, slot: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Fill one slot; no other is touched. Returns when the device is done."""
        binding = self._writer.io_binding()
        binding.bind_cpu_input(SLOT, np.array([[slot]]))
        for name, array in self.arrays.items():
            binding.bind_ortvalue_input(name, array)
            binding.bind_ortvalue_output(_written(name), array)
            binding.bind_cpu_input(_values(name), values[name][None])
        self._writer.run_with_iobinding(binding)

    def release_from(self, _: int) -> None:
        """Nothing: a device's tensor has its memory as long as it lives."""


def _scatter(shapes: Mapping[str, tuple[int, ...]], num_slots: int) -> bytes:
    """A graph that writes one slot of every tensor."""
    inputs = [helper.make_tensor_value_info(SLOT, TensorProto.INT64, [1, 1])]
    outputs: list[ValueInfoProto] = []
    nodes: list[NodeProto] = []
    for name, shape in shapes.items():
        for given, length in ((name, num_slots), (_values(name), 1)):
            value = helper.make_tensor_value_info(given, TensorProto.FLOAT, [length, *shape])
            inputs.append(value)
        written = helper.make_tensor_value_info(
            _written(name), TensorProto.FLOAT, [num_slots, *shape]
        )
        outputs.append(written)
        nodes.append(helper.make_node("ScatterND", [name, SLOT, _values(name)], [_written(name)]))
    graph = helper.make_graph(nodes, "write one slot", inputs, outputs)
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def _values(name: str) -> str:
    return f"{name}: values"


def _written(name: str) -> str:
    return f"{name}: written"
