"""ONNX Runtime sessions as serving makes them."""

from __future__ import annotations

from typing import Any, Literal

import onnxruntime

Device = Literal["cpu", "cuda"]

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"

onnxruntime.set_default_logger_severity(3)  # warnings of ONNX Runtime are for those who export


class DeviceError(Exception):
    """The device that was asked for cannot be used."""


def open_session(graph: bytes, device: Device = "cpu") -> onnxruntime.InferenceSession:
    """An ONNX Runtime session with one thread that does not spin: replicas are the parallelism.

    Raises:
        DeviceError: the session did not get that device.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without `enable_fallback=0`, a GPU that fails in use is replaced by the CPU without a word.
    session = onnxruntime.InferenceSession(
        graph, options, providers=_PROVIDERS[device], enable_fallback=0
    )
    # What was asked for is not what a session gets: without CUDA's libraries it is the CPU.
    got = session.get_providers()
    if device == "cuda" and CUDA not in got:
        raise DeviceError(f"A session that asked for {CUDA} got {', '.join(got)}.")
    return session


def limit_arenas(num_bytes: int) -> None:
    """Let each session that this process opens from now on take at most this much of a GPU."""
    _CUDA_OPTIONS["gpu_mem_limit"] = str(num_bytes)


_CUDA_OPTIONS = {
    # The default doubles the arena's memory whenever it grows.
    "arena_extend_strategy": "kSameAsRequested",
    # Batches have any size, and the default search tries every algorithm anew for each size.
    "cudnn_conv_algo_search": "HEURISTIC",
    # TF32 keeps 10 bits of a product's factors: golden samples would not come out again.
    "use_tf32": "0",
}
_PROVIDERS: dict[Device, list[Any]] = {"cpu": [CPU], "cuda": [(CUDA, _CUDA_OPTIONS), CPU]}
