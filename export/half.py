"""A float trunk to FP16, for devices that compute in it."""

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.quantize import layers_of


def to_half(graph: bytes) -> bytes:
    """The graph in FP16 between its normalisation, which stays as it is, and its float outputs.

    A CPU converts at every node it has no FP16 kernel for: there this is for measuring accuracy,
    and slower than float.
    """
    model = onnx.load_model_from_string(graph)
    in_layers = {name for layer in layers_of(graph) for name in layer}
    normalisation = [node.name for node in model.graph.node if node.name not in in_layers]
    half = convert_float_to_float16(model, keep_io_types=True, node_block_list=normalisation)
    return half.SerializeToString(deterministic=True)
