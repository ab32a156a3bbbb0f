"""What changed from one bundle to another: labels, metrics, weights, answers, origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from safetensors.numpy import load

from export.bundle import ADAPTER, GOLDEN, Bundle
from serve.contender import Contender
from serve.engine import Engine
from serve.heads import HeadOutputError, graph_file, score

Weights = Mapping[str, NDArray[Any]]


def diff(a: Bundle, b: Bundle, engine: Engine) -> dict[str, Any]:
    """Everything that tells two bundles apart, as JSON.

    What they say of golden pictures (`golden`) is None unless both are for the trunk that is
    served.

    Raises:
        GateError: one of them cannot be loaded.
    """
    return {
        "a": _about(a),
        "b": _about(b),
        "labels": _labels(a.manifest.labels, b.manifest.labels),
        "metrics": _metrics(a, b),
        "packages": _packages(a, b),
        "weights": weights_distance(_weights(a), _weights(b)),
        "golden": _golden(a, b, engine) if _are_for(engine, a, b) else None,
    }


def weights_distance(a: Weights, b: Weights) -> dict[str, Any]:
    """How far the weights of the second are from those of the first, in norms of the first.

    Only where each has the other's tensors, by name and shape; else it says why there is no number.
    """
    if not a and not b:
        return {"distance": None, "reason": "neither graph keeps weights that can be compared"}
    shapes = [{name: w.shape for name, w in weights.items()} for weights in (a, b)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            name
            for name in {**shapes[0], **shapes[1]}
            if shapes[0].get(name) != shapes[1].get(name)
        )
        one = differing[0]
        return {
            "distance": None,
            "reason": f"{len(differing)} tensors differ in name or shape, as {one}: "
            f"{shapes[0].get(one, 'none')} and {shapes[1].get(one, 'none')}",
        }
    vectors = [
        np.concatenate([np.ravel(weights[name]).astype(np.float64) for name in sorted(weights)])
        for weights in (a, b)
    ]
    norm = float(np.linalg.norm(vectors[0]))
    if norm == 0:
        return {"distance": None, "reason": "the first has no weight other than 0"}
    distance = float(np.linalg.norm(vectors[1] - vectors[0])) / norm
    return {"distance": distance, "reason": f"{len(a)} tensors of the same names and shapes"}


def _about(bundle: Bundle) -> dict[str, Any]:
    manifest, origin = bundle.manifest, bundle.manifest.provenance
    return {
        "bundle": bundle.digest,
        "trunk": manifest.trunk,
        "kind": manifest.kind,
        "link": manifest.link,
        "thresholds": manifest.thresholds,
        "adapter": manifest.adapter.model_dump() if manifest.adapter else None,
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "data": manifest.data.model_dump(),
        "command": origin.command,
        "created_at": origin.created_at,
        "seed": origin.seed,
    }


def _labels(a: tuple[str, ...], b: tuple[str, ...]) -> dict[str, Any]:
    kept = [label for label in a if label in b]
    return {
        "added": [label for label in b if label not in a],
        "removed": [label for label in a if label not in b],
        "reordered": kept != [label for label in b if label in a],
    }


def _metrics(a: Bundle, b: Bundle) -> dict[str, Any]:
    mine, theirs = a.manifest.metrics, b.manifest.metrics
    return {
        name: {
            side: metrics[name].model_dump() if name in metrics else None
            for side, metrics in (("a", mine), ("b", theirs))
        }
        for name in {**mine, **theirs}
    }


def _packages(a: Bundle, b: Bundle) -> dict[str, Any]:
    """Versions of the packages that differ."""
    mine, theirs = a.manifest.provenance.versions, b.manifest.provenance.versions
    return {
        name: {"a": mine.get(name), "b": theirs.get(name)}
        for name in sorted({**mine, **theirs})
        if mine.get(name) != theirs.get(name)
    }


def _weights(bundle: Bundle) -> Weights:
    """The numbers of the graph and of the adapter, by name."""
    graph = onnx.load_model_from_string(bundle.files[graph_file(bundle.manifest)]).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {n: w for n, w in tensors.items() if np.issubdtype(w.dtype, np.floating)}
    if ADAPTER in bundle.files:
        weights |= {f"{ADAPTER}: {n}": w for n, w in load(bundle.files[ADAPTER]).items()}
    return weights


def _are_for(engine: Engine, *bundles: Bundle) -> bool:
    return all(bundle.manifest.trunk == engine.manifest.digest for bundle in bundles)


def _golden(a: Bundle, b: Bundle, engine: Engine) -> dict[str, Any]:
    """What both say of the golden pictures of either."""
    pictures = [p for bundle in (a, b) for p in load(bundle.files[GOLDEN])["pictures"]]
    unique = np.stack(list({picture.tobytes(): picture for picture in pictures}.values()))
    answers = [_answers(bundle, unique, engine) for bundle in (a, b)]
    changed: list[dict[str, Any]] = []
    largest = 0.0
    for place, (mine, theirs) in enumerate(zip(*answers, strict=True)):
        shared = mine.scores.keys() & theirs.scores.keys()
        apart = (abs(mine.scores[label] - theirs.scores[label]) for label in shared)
        largest = max([largest, *apart])
        if set(mine.labels) != set(theirs.labels):
            changed.append({"picture": place, "a": mine.told(), "b": theirs.told()})
    return {
        "pictures": len(unique),
        "agreement": 1 - len(changed) / len(unique),
        "largest_score_change": largest,
        "changed": changed,
    }


@dataclass(frozen=True)
class _Answer:
    """What a bundle says of a picture: scores by label, and the labels that it gives."""

    scores: dict[str, float]
    labels: tuple[str, ...]
    is_multilabel: bool

    def told(self) -> dict[str, Any]:
        best = max(self.scores, key=lambda label: self.scores[label])
        more = {"labels": list(self.labels)} if self.is_multilabel else {}
        return {"label": best, "score": self.scores[best], **more}


def _answers(bundle: Bundle, pictures: NDArray[np.uint8], engine: Engine) -> list[_Answer]:
    contender = Contender(bundle, engine)
    logits = list(contender.logits(contender.start(pictures)))
    rows = score(logits, [contender.head] * len(logits))
    answers: list[_Answer] = []
    for row in rows:
        assert not isinstance(row, HeadOutputError), "its golden pictures passed the gate"
        scores = dict(zip(bundle.manifest.labels, row.tolist(), strict=True))
        head = contender.head
        answers.append(_Answer(scores, head.labels_given(row), head.is_multilabel))
    return answers
