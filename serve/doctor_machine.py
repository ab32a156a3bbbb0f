"""What may be wrong with an installation; each check looks at one thing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import resource
import tempfile
from collections.abc import Iterable
from pathlib import Path

import onnxruntime

from serve.devices import cuda_problem
from serve.doctor import Finding
from serve.runtime import RuntimeProblemError, free_ports, haproxy_binary, is_port_free

PACKAGES = ("headstock", "ray", "obstore", "pydantic", "numpy")
RUNTIMES = ("onnxruntime-gpu", "onnxruntime")
HOST, PORT = "127.0.0.1", 8000  # where `serve` listens unless it is told otherwise
NUM_FILES = 4096  # HAProxy takes 2048 connections, and each is two


def check_machine() -> Iterable[Finding]:
    """All of them."""
    yield check_versions()
    yield check_haproxy()
    yield check_device()
    yield check_ports()
    yield check_learning()
    yield check_open_files()


def check_versions() -> Finding:
    """One build of ONNX Runtime, and which versions there are."""
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    runtimes = [name for name in RUNTIMES if _version(name)]
    says = ", ".join(f"{name} {version}" for name, version in versions.items())
    if len(runtimes) > 1:
        return Finding(
            "versions",
            "problem",
            f"{' and '.join(runtimes)} are both installed, and overwrite each other.",
            f"Uninstall both, then install {RUNTIMES[0]} (Linux on x86-64) or {RUNTIMES[1]}.",
        )
    return Finding("versions", "ok", f"Python {platform.python_version()}, {says}.")


def check_haproxy() -> Finding:
    """The proxy in front, without which Ray's own is used."""
    try:
        return Finding("haproxy", "ok", f"{haproxy_binary()}.")
    except RuntimeProblemError as error:
        return Finding("haproxy", "warning", str(error), "Install it, or serve --proxy python.")


def check_device() -> Finding:
    """What a session really gets, not what ONNX Runtime lists."""
    problem = cuda_problem()
    says = f"ONNX Runtime {onnxruntime.__version__} runs on " + (
        f"the CPU: {problem}." if problem else "the GPU."
    )
    return Finding("device", "ok", says, "" if not problem else "For a GPU: docs/serving.md.")


def check_ports() -> Finding:
    """The front door, and a block for what is behind it."""
    if not is_port_free(HOST, PORT):
        return Finding(
            "ports", "warning", f"Port {PORT} of {HOST} is taken.", "Serve with another --port."
        )
    try:
        first = free_ports(Path(tempfile.gettempdir()))
    except RuntimeProblemError as error:
        return Finding("ports", "problem", str(error), "Stop what is no longer needed.")
    return Finding("ports", "ok", f"{PORT} is free, and a block of others, from {first} on.")


def check_learning() -> Finding:
    """Whether the commands that learn and export can run."""
    if importlib.util.find_spec("torch") is None:
        return Finding(
            "learning",
            "warning",
            "There is no PyTorch: demo, teach, distil, export and head cannot run, all others can.",
            'pip install "headstock[learn]"',
        )
    return Finding("learning", "ok", f"PyTorch {_version('torch')}: every command can run.")


def check_open_files() -> Finding:
    """Every connection is an open file, in the proxy two."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit < NUM_FILES:
        return Finding(
            "open files",
            "warning",
            f"A process may open {limit} files; a busy service needs {NUM_FILES}.",
            f"ulimit -n {NUM_FILES}" if most >= NUM_FILES else "Raise the limit as administrator.",
        )
    return Finding("open files", "ok", f"A process may open {limit}.")


def _version(package: str) -> str:
    """Version of an installed package, or nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
