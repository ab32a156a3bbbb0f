"""The answer to an inference request: outputs as JSON or raw, or as the best classes of each row.

Source: Open Inference Protocol V2, inference response; its binary tensor data extension; Triton's
classification extension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import orjson
from numpy.typing import NDArray

from serve.http.oip.models import LABEL, SCORES, Model
from serve.http.oip.request import InferRequest, OutputParameters, Wanted
from serve.http.oip.tensors import Elements, to_raw
from serve.http.problems import RequestError
from serve.jobs import Answer


def wanted_outputs(request: InferRequest) -> Sequence[Wanted]:
    """The outputs that are asked for, all if none is named.

    Raises:
        RequestError: one is unknown, named twice, or has no classes.
    """
    if request.outputs is None:
        return [Wanted(name=SCORES), Wanted(name=LABEL)]
    names = [wanted.name for wanted in request.outputs]
    if unknown := sorted(set(names) - {SCORES, LABEL}):
        raise RequestError(
            400, f"Output {unknown[0]!r:.80} is unknown; expected {SCORES} or {LABEL}."
        )
    if len(set(names)) != len(names):
        raise RequestError(400, f"An output is named twice in {names!r:.80}.")
    for wanted in request.outputs:
        if wanted.parameters.classification and wanted.name != SCORES:
            raise RequestError(400, f"Output {wanted.name!r} has no classes; {SCORES} has.")
    return request.outputs


def infer_response(
    model: Model, request: InferRequest, answers: Sequence[Answer]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON part; None if there is nothing else in it.

    Args:
        answers: One for each row, all of one version and side.
    """
    live = answers[0].live
    outputs: list[dict[str, object]] = []
    raws: list[bytes] = []
    for wanted in wanted_outputs(request):
        shape, elements = _output(wanted, answers)
        output: dict[str, object] = {
            "name": wanted.name,
            "shape": shape,
            "datatype": "FP32" if isinstance(elements, np.ndarray) else "BYTES",
        }
        if _is_raw(wanted.parameters, request):
            raws.append(to_raw(elements))
            output["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            output["data"] = _listed(elements)
        outputs.append(output)
    header = {
        "model_name": model.name,
        "model_version": str(live.version),
        **({} if request.id is None else {"id": request.id}),
        "parameters": {"bundle": live.bundle},
        "outputs": outputs,
    }
    data = orjson.dumps(header)
    return b"".join([data, *raws]), len(data) if raws else None


def _output(wanted: Wanted, answers: Sequence[Answer]) -> tuple[list[int], Elements]:
    scores = np.stack([answer.scores for answer in answers])
    labels = answers[0].live.head.labels
    if most := wanted.parameters.classification:
        num_best = min(most, len(labels))
        best = [text for row in scores for text in _best(row, labels, num_best)]
        return [len(scores), num_best], best
    if wanted.name == SCORES:
        return list(scores.shape), scores
    return [len(scores)], [labels[place].encode() for place in scores.argmax(axis=1)]


def _best(scores: NDArray[np.float32], labels: Sequence[str], num_best: int) -> list[bytes]:
    """`score:index:label` of the best, in the order of the labels where they are equal."""
    places = np.argsort(-scores, kind="stable")[:num_best]
    return [f"{scores[place]:f}:{place}:{labels[place]}".encode() for place in places]


def _is_raw(parameters: OutputParameters, request: InferRequest) -> bool:
    if parameters.binary_data is None:
        return request.parameters.binary_data_output
    return parameters.binary_data


def _listed(elements: Elements) -> list[object]:
    """A flat list, row by row."""
    if isinstance(elements, np.ndarray):
        return elements.ravel().tolist()
    return [data.decode() for data in elements]
