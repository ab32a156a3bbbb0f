"""What is recorded of an artefact's origin."""

from __future__ import annotations

from datetime import UTC, datetime

import onnxruntime
import torch

from export.provenance import provenance_of


def test_provenance_names_command_seed_time_and_versions() -> None:
    """Enough to make the artefact again."""
    before = datetime.now(UTC).replace(microsecond=0)
    provenance = provenance_of(command="headstock export a --out b", seed=7)
    made_at = datetime.fromisoformat(provenance.created_at)

    assert (provenance.command, provenance.seed) == ("headstock export a --out b", 7)
    assert before <= made_at <= datetime.now(UTC)
    assert provenance.versions["onnxruntime"] == onnxruntime.__version__
    assert torch.__version__.startswith(provenance.versions["torch"].split("+")[0])
    assert {"onnx", "onnxscript", "numpy"} <= provenance.versions.keys()
