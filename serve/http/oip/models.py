"""The models of the Open Inference Protocol: every task is three, one for each kind of input.

`TASK` takes encoded pictures, `TASK.pixels` pictures as the trunk takes them, `TASK.features` what
the trunk makes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from starlette.requests import Request

from export.bundle import TrunkManifest
from serve.engine import LiveHead
from serve.http.oip.tensors import TensorSpec
from serve.http.problems import RequestError
from serve.jobs import FeaturesOnlyError, RetiredTaskError, UnknownTaskError
from serve.record import LogView, TaskChange, TaskVersion
from serve.versions import NUM_RECENT, NoVersionError, reason_of, recent

BATCH = -1
MAX_VERSION_DIGITS = 15
KINDS = ("", "pixels", "features")
PLATFORM = "onnx_onnxv1"
SCORES, LABEL = "scores", "label"
CONFIG_TYPES = {"BYTES": "TYPE_STRING", "FP32": "TYPE_FP32", "UINT8": "TYPE_UINT8"}


@dataclass(frozen=True)
class Model:
    """One of the three models of a task; `kind` is "", "pixels" or "features"."""

    task: str
    kind: str

    @property
    def name(self) -> str:
        """As callers write it."""
        return f"{self.task}.{self.kind}" if self.kind else self.task

    def input_of(self, trunk: TrunkManifest) -> TensorSpec:
        """The one input that it has."""
        if self.kind == "features":
            return TensorSpec("features", "FP32", (BATCH, trunk.num_features))
        if self.kind == "pixels":
            size_px = trunk.preprocessing.size_px
            return TensorSpec("pixels", "UINT8", (BATCH, size_px, size_px, 3))
        return TensorSpec("image", "BYTES", (BATCH,))

    def listed(self, view: LogView) -> tuple[TaskVersion, ...]:
        """Those that are spoken of, oldest first; none if the task is not live.

        Of features the live one alone: what an older one takes is in its bundle, not in the log.
        """
        versions = recent(view, self.task)
        return versions[-1:] if self.kind == "features" else versions

    def versions(self, view: LogView) -> tuple[TaskVersion, ...]:
        """Those of them that answer."""
        return tuple(known for known in self.listed(view) if not reason_of(view, known))

    def version(self, view: LogView, number: int | None) -> TaskVersion:
        """One that answers; None: the live one.

        Raises:
            UnknownTaskError: the task was never pushed.
            RetiredTaskError: it is retired, and answers as no version.
            NoVersionError: there is no such version, or it answers no longer.
        """
        last = view.last(self.task)
        if last is None:
            raise UnknownTaskError(self.task, view.tasks)
        if last.change.bundle is None:
            raise RetiredTaskError(self.task, last.change.version, last.written_at)
        asked = last.change.version if number is None else number
        known = {version.change.version: version for version in self.listed(view)}
        version = known.get(asked)
        reason = reason_of(view, version) if version else ""
        if version is None or reason:
            raise NoVersionError(self.name, asked, self.versions(view), reason)
        return version

    def reason_against(self, live: LiveHead | None) -> str:
        """Why it cannot be asked, as the task is live now; "" if it can."""
        if self.kind == "features" and live is not None and live.needs_picture:
            return str(FeaturesOnlyError(self.task))
        return ""


def asked_model(request: Request) -> Model:
    """The model in a request's path, of a task that need not be there.

    Raises:
        RequestError: no model is named like this.
    """
    name: str = request.path_params["model"]
    task, dot, kind = name.partition(".")
    if not task or (dot and kind not in KINDS[1:]):
        raise RequestError(
            404,
            f"Request for unknown model: {name!r:.100} is not found; a task is a model, and so are "
            "TASK.pixels and TASK.features.",
        )
    return Model(task, kind)


def asked_version(request: Request) -> int | None:
    """The version in a request's path; None if it names none.

    Raises:
        RequestError: it is no number.
    """
    value: str | None = request.path_params.get("version")
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) <= MAX_VERSION_DIGITS):
        raise RequestError(400, f"The version is {value!r:.40}; versions are whole numbers.")
    return int(value)


def models_of(task: str) -> Iterator[Model]:
    """The three of a task."""
    return (Model(task, kind) for kind in KINDS)


def outputs_of(change: TaskChange) -> list[TensorSpec]:
    """What every model of a version gives."""
    sides = (change, change.candidate) if change.candidate else (change,)
    counts = {len(side.labels) for side in sides}
    num_labels = counts.pop() if len(counts) == 1 else -1
    return [
        TensorSpec(SCORES, "FP32", (BATCH, num_labels)),
        TensorSpec(LABEL, "BYTES", (BATCH,)),
    ]


def metadata(
    model: Model, version: TaskVersion, versions: Iterable[TaskVersion], trunk: TrunkManifest
) -> dict[str, object]:
    """Model metadata.

    Args:
        version: The one that is described.
        versions: All that answer.
    """
    change = version.change
    return {
        "name": model.name,
        "versions": [str(known.change.version) for known in versions],
        "platform": PLATFORM,
        "inputs": [model.input_of(trunk).described()],
        "outputs": [spec.described() for spec in outputs_of(change)],
        "properties": {"bundle": change.bundle, "trunk": trunk.digest},
    }


def config(
    model: Model, version: TaskVersion, trunk: TrunkManifest, *, max_rows: int
) -> dict[str, object]:
    """Model configuration, of which load generators read `max_batch_size`."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "version_policy": {"latest": {"num_versions": NUM_RECENT}},
        "max_batch_size": max_rows,
        "input": [_configured(model.input_of(trunk))],
        "output": [_configured(spec) for spec in outputs_of(version.change)],
        "dynamic_batching": {},
    }


def _configured(spec: TensorSpec) -> dict[str, object]:
    # Without the dimension of the batch, which the configuration leaves out.
    return {
        "name": spec.name,
        "data_type": CONFIG_TYPES[spec.datatype],
        "dims": list(spec.shape[1:]),
    }
