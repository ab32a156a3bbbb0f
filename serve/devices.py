"""Which device runs the trunk: asked for by a setting, decided by what a session really got."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from serve.onnx_session import CUDA, Device, DeviceError, limit_arenas, open_session

logger = logging.getLogger(__name__)

SHARE_STEPS = 10_000  # Ray counts parts of a GPU in ten-thousandths
# Of a replica's memory a third is for either graph of the trunk, plain and adapted. The last third
# is for what no session's limit covers: CUDA's own context, the adapter bank, tails.
SESSION_SHARE = 1 / 3


def choose_device(wanted: Device | Literal["auto"]) -> Device:
    """The device of this process; what it is and why goes to the log.

    "auto" is the GPU if one can be used, else the CPU.

    Raises:
        DeviceError: "cuda" is wanted, and cannot be used.
    """
    if wanted == "cpu":
        logger.info("device cpu, as set")
        return "cpu"
    problem = cuda_problem()
    if problem and wanted == "cuda":
        raise _unusable(problem)
    if problem:
        logger.info("device cpu: %s", problem)
        return "cpu"
    logger.info("device cuda: a session asked for %s and got it", CUDA)
    return "cuda"


def cuda_problem() -> str:
    """Why the GPU cannot be used; nothing if a session asked for it, got it and ran."""
    # A session is tried only where it may succeed: where not, ONNX Runtime prints errors in red.
    return _missing() or _session_problem()


def refuse_without_gpu(wanted: Device | Literal["auto"]) -> None:
    """Say at once, without taking memory of a GPU, that "cuda" cannot be used on this machine.

    Raises:
        DeviceError: "cuda" is wanted, and this machine has no GPU or no ONNX Runtime for it.
    """
    if wanted == "cuda" and (problem := _missing()):
        raise _unusable(problem)


def gpu_share(wanted: Device | Literal["auto"], *, replicas: int, num_gpus: int) -> float:
    """GPUs for each replica, such that all replicas fit on those that the cluster has.

    Raises:
        DeviceError: "cuda" is wanted, and the cluster has no GPU.
    """
    if wanted == "cuda" and not num_gpus:
        raise DeviceError(
            "Setting device is cuda, but Ray sees no GPU on any node. Add a node that has one, or "
            "serve with --device cpu."
        )
    if wanted == "cpu" or not num_gpus:
        return 0.0
    replicas_on_one = math.ceil(replicas / num_gpus)
    return math.floor(SHARE_STEPS / replicas_on_one) / SHARE_STEPS


def limit_gpu_memory(share: float) -> None:
    """Keep the sessions of this process within its share of a GPU; nothing to do for all or none.

    Each session has an arena of its own, and the limit is of one arena, not of the process.
    """
    if 0 < share < 1:
        limit_arenas(math.floor(_gpu_memory_bytes() * share * SESSION_SHARE))


def _unusable(problem: str) -> DeviceError:
    return DeviceError(
        f"Setting device is cuda, but it cannot be used: {problem}. ONNX Runtime lists "
        f"{', '.join(onnxruntime.get_available_providers())}. Install headstock[gpu] and NVIDIA's "
        "driver, or serve with --device cpu."
    )


def _missing() -> str:
    """What CUDA needs and this machine lacks, as far as it shows without trying; else nothing."""
    if CUDA not in onnxruntime.get_available_providers():
        return f"ONNX Runtime is built without {CUDA}"
    if not _num_gpus():
        return "NVIDIA's driver shows no GPU"
    return ""


def _num_gpus() -> int:
    """GPUs that the driver shows this process, which `CUDA_VISIBLE_DEVICES` limits."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _gpu_memory_bytes() -> int:
    """Memory of the first GPU that the driver shows this process."""
    driver, device, total = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0), ctypes.c_size_t(0)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        raise DeviceError("Ray gave this replica a part of a GPU, and the driver shows none.")
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return total.value


def _session_problem() -> str:
    """Why a session that asks for CUDA does not get it or cannot run; nothing if it can."""
    with _printed_errors() as printed:
        try:
            # The libraries of the extra `gpu` are not where the system's loader looks.
            onnxruntime.preload_dlls()
            open_session(_doubling(), "cuda").run(None, {"x": np.ones(1, np.float32)})
        # ONNX Runtime has no common error class below Exception.
        except Exception as error:  # noqa: BLE001
            return _first_line(printed()) or _first_line(str(error)) or repr(error)
    return ""


@contextlib.contextmanager
def _printed_errors() -> Iterator[Callable[[], str]]:
    """Keep from the terminal what ONNX Runtime prints, and let the caller read its errors.

    The library writes past Python, so the process's own descriptor is turned away meanwhile.
    """
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):

        def printed() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield printed
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _first_line(text: str) -> str:
    """The first line without colours, and without where in ONNX Runtime's source it comes from."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    return lines[0].rpartition(" : ")[2].strip().rstrip(".") if lines else ""


def _doubling() -> bytes:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "probe", value[:1], value[1:]
    )
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
