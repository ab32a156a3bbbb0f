"""How an artefact came to be: command, time, seed and versions."""

from datetime import UTC, datetime

import onnx
import onnxruntime
import onnxscript

from export.bundle import Provenance
from models.checkpoint import package_versions


def provenance_of(*, command: str, seed: int) -> Provenance:
    """What is known now: this installation's versions and the present time in UTC."""
    return Provenance(
        command=command,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        # ONNX Runtime is asked itself, since its distribution has two names (with CUDA, without).
        versions=package_versions()
        | {module.__name__: module.__version__ for module in (onnx, onnxruntime, onnxscript)},
    )
