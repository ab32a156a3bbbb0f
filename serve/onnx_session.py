"""ONNX Runtime sessions as serving makes them."""

from __future__ import annotations

import onnxruntime

onnxruntime.set_default_logger_severity(3)  # warnings of ONNX Runtime are for those who export


def open_session(graph: bytes) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session with one thread that does not spin: replicas are the parallelism."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
