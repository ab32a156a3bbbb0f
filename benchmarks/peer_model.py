"""What each peer serves: our decoder, our graphs, and ONNX Runtime with one thread.

It runs in the peers' own environments, so it imports nothing but numpy, ONNX Runtime and Pillow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from models.pictures import Preprocessing, load_picture


class PeerModels:
    """Whole networks, one a task, each a session of the trunk and one of its head.

    Args:
        folder: `trunk.onnx`, `head0.onnx`, ... and `model.json`.
    """

    def __init__(self, folder: Path, num_models: int) -> None:
        described = json.loads((folder / "model.json").read_text())
        self._preprocessing = Preprocessing(**described["preprocessing"])
        self._labels: list[str] = described["labels"]
        self._networks = [
            (_session(folder / "trunk.onnx"), _session(folder / f"head{number}.onnx"))
            for number in range(num_models)
        ]

    def answers(self, jpegs: Sequence[bytes]) -> list[list[dict[str, object]]]:
        """What every model says of every picture; each picture is decoded once."""
        pictures = np.stack([load_picture(jpeg, self._preprocessing) for jpeg in jpegs])
        scores = []
        for trunk, head in self._networks:
            features = trunk.run(["features"], {"images": pictures})[0]
            logits = np.asarray(head.run(["logits"], {"features": features})[0])
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            scores.append(exponentials / exponentials.sum(axis=1, keepdims=True))
        return [
            [self._answer(of_model[number]) for of_model in scores] for number in range(len(jpegs))
        ]

    def _answer(self, scores: np.ndarray) -> dict[str, object]:
        values, best = scores.tolist(), int(scores.argmax())
        return {
            "label": self._labels[best],
            "score": values[best],
            "scores": dict(zip(self._labels, values, strict=True)),
        }


def _session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
