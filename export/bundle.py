"""The contract between learning and serving: what a trunk folder and a bundle are.

A bundle is a handful of files with a `manifest.json` that names the sha256 and size of every other
one; the sha256 of the manifest's own bytes is the bundle's digest. So one digest pins everything,
and how the files travel (a folder, a zip, blobs in an object store) does not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Pydantic reads this annotation at run time.
from models.pictures import Preprocessing  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MANIFEST = "manifest.json"
HEAD = "head.onnx"
GOLDEN = "golden.safetensors"
CARD = "card.md"
TRUNK_MANIFEST = "trunk.json"
TRUNK_GRAPH = "trunk.onnx"
STUDENT = "student.safetensors"

MAX_BUNDLE_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 2**20

type_of_digest = Field(pattern=r"^sha256:[0-9a-f]{64}$")
Digest = Annotated[str, type_of_digest]
TaskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class BundleError(ValueError):
    """A bundle or trunk folder that is not what its manifest says, or not of this format."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Record):
    """What the manifest says of another file."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]


class Estimate(_Record):
    """A measured quantity with its 95 % interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    num_samples: Annotated[int, Field(ge=1)]


class DataFingerprint(_Record):
    """Which data a head was trained on, without the data."""

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    num_pictures: dict[str, dict[str, int]] = Field(description="split -> label -> pictures")


class Provenance(_Record):
    """How an artefact came to be, enough to make it again."""

    command: str
    created_at: str = Field(description="UTC, ISO 8601")
    seed: int
    versions: dict[str, str] = Field(description="package -> version")


class Manifest(_Record):
    """`manifest.json` of a bundle."""

    schema_version: Literal[1] = 1
    task: TaskName
    kind: Literal["head"] = "head"
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=100_000)]
    link: Literal["softmax", "sigmoid", "none"] = "softmax"
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    trunk: Digest
    num_features: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing
    data: DataFingerprint
    metrics: dict[str, Estimate]
    provenance: Provenance
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels are not unique")
        if set(self.files) != {HEAD, GOLDEN, CARD}:
            raise ValueError(f"files are {sorted(self.files)}, expected {[CARD, GOLDEN, HEAD]}")
        return self


class TrunkManifest(_Record):
    """`trunk.json` of a trunk folder."""

    schema_version: Literal[1] = 1
    backbone: str
    cut: str = Field(description="the layer at which the backbone is cut into prefix and suffix")
    num_features: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing
    golden_tolerance: dict[Literal["fp32", "int8", "fp16"], float] = Field(
        description="precision -> largest absolute difference of a logit that still reproduces"
    )
    provenance: Provenance
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if TRUNK_GRAPH not in self.files:
            raise ValueError(f"files are {sorted(self.files)}, expected {TRUNK_GRAPH} among them")
        return self

    @property
    def digest(self) -> Digest:
        """Digest of the float graph and the preprocessing: what a head depends on.

        Precisions are variants of one trunk, and provenance changes nothing that a head sees, so
        neither is part of it.
        """
        identity = {
            "graph": self.files[TRUNK_GRAPH].sha256,
            "preprocessing": [
                self.preprocessing.size_px,
                self.preprocessing.resize_px,
                *self.preprocessing.mean,
                *self.preprocessing.std,
            ],
        }
        return digest_of(json.dumps(identity, sort_keys=True).encode())


def digest_of(data: bytes) -> Digest:
    """`sha256:` and the hash of the bytes in hexadecimal."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def entry_of(data: bytes) -> FileEntry:
    """What a manifest says of a file with these bytes."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))


@dataclass(frozen=True)
class Bundle:
    """A bundle whose every byte has been checked against its manifest.

    Made by `Bundle.pack`, `Bundle.of_folder`, `Bundle.of_zip` or `Bundle.of_files`.
    """

    manifest: Manifest
    manifest_bytes: bytes
    files: Mapping[str, bytes]  # without the manifest

    @property
    def digest(self) -> Digest:
        """Digest of the manifest's bytes, and through it of every file."""
        return digest_of(self.manifest_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return len(self.manifest_bytes) + sum(len(data) for data in self.files.values())

    @classmethod
    def pack(cls, files: Mapping[str, bytes], **fields: object) -> Self:
        """A new bundle of these files; `fields` are those of `Manifest` but for `files`.

        Raises:
            BundleError: a field is missing, unknown or out of range.
        """
        entries = {name: entry_of(data) for name, data in files.items()}
        try:
            manifest = Manifest.model_validate({**fields, "files": entries})
        except ValidationError as error:
            raise BundleError(f"The manifest is invalid: {_first_problem(error)}.") from error
        return cls(manifest, manifest.model_dump_json(indent=2).encode(), dict(files))

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Read and check a bundle's folder.

        Raises:
            BundleError: no bundle, or a file missing, extra, changed or too large.
        """
        if not (folder / MANIFEST).is_file():
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.")
        size_bytes, files = 0, {}
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{path.name} is not a plain file; a bundle has no others.")
            size_bytes += path.stat().st_size
            if size_bytes > MAX_BUNDLE_BYTES:
                raise BundleError(f"The bundle is larger than {MAX_BUNDLE_BYTES} bytes.")
            files[path.name] = path.read_bytes()
        return cls.of_files(files)

    @classmethod
    def of_zip(cls, data: bytes) -> Self:
        """Read and check a bundle's zip. Names with a folder are refused, so nothing can escape.

        Raises:
            BundleError: no zip, or see `of_folder`.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return cls.of_files(_unzip(archive))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise BundleError(f"The body is not a readable zip file: {error}.") from error
        except (OSError, ValueError, zipfile.zlib.error) as error:  # pyrefly: ignore
            if isinstance(error, BundleError):
                raise
            raise BundleError(f"The zip file is damaged: {error}.") from error

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> Self:
        """Check files, `manifest.json` among them, against the manifest.

        Raises:
            BundleError: see `of_folder`.
        """
        if MANIFEST not in files:
            raise BundleError(f"The bundle has no {MANIFEST}.")
        manifest_bytes = files[MANIFEST]
        if len(manifest_bytes) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes.")
        try:
            manifest = Manifest.model_validate_json(manifest_bytes)
        except ValidationError as error:
            raise BundleError(f"{MANIFEST} is invalid: {_first_problem(error)}.") from error
        others = {name: data for name, data in files.items() if name != MANIFEST}
        check_files(others, manifest.files)
        return cls(manifest, manifest_bytes, others)

    def write(self, folder: Path) -> None:
        """Write the bundle as a folder, made if it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        # Last, so that a folder with a manifest is whole.
        (folder / MANIFEST).write_bytes(self.manifest_bytes)

    def to_zip(self) -> bytes:
        """The bundle as a zip file, ready to push."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in {MANIFEST: self.manifest_bytes, **self.files}.items():
                archive.writestr(name, data)
        return buffer.getvalue()


def check_files(files: Mapping[str, bytes], entries: Mapping[str, FileEntry]) -> None:
    """Compare files with what a manifest says of them.

    Raises:
        BundleError: a file is missing, not listed, or its bytes are not those listed.
    """
    if missing := sorted(entries.keys() - files.keys()):
        raise BundleError(f"{missing[0]} is listed in the manifest but missing.")
    if extra := sorted(files.keys() - entries.keys()):
        raise BundleError(f"{extra[0]} is not listed in the manifest.")
    for name, entry in entries.items():
        if entry_of(files[name]) != entry:
            raise BundleError(
                f"{name} is damaged: {len(files[name])} bytes do not have the size and sha256 "
                "that the manifest names. Export the bundle again."
            )


def read_trunk_manifest(data: bytes) -> TrunkManifest:
    """Parse `trunk.json`.

    Raises:
        BundleError: it is not of this format.
    """
    try:
        return TrunkManifest.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{TRUNK_MANIFEST} is invalid: {_first_problem(error)}.") from error


def read_trunk_folder(folder: Path) -> tuple[TrunkManifest, dict[str, bytes]]:
    """Read and check a trunk's folder; `student.safetensors` is training's and not required.

    Returns:
        The manifest, and the bytes of each listed file that is there.

    Raises:
        BundleError: no trunk, or a file is missing or changed.
    """
    if not (folder / TRUNK_MANIFEST).is_file():
        raise BundleError(f"{folder} is not a trunk: it has no {TRUNK_MANIFEST}.")
    manifest = read_trunk_manifest((folder / TRUNK_MANIFEST).read_bytes())
    present = {
        name: entry
        for name, entry in manifest.files.items()
        if name != STUDENT or (folder / name).exists()
    }
    files = {name: (folder / name).read_bytes() for name in present if (folder / name).is_file()}
    check_files(files, present)
    return manifest, files


def _unzip(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Read every member, bounded by bytes really inflated and not by what the zip claims."""
    files: dict[str, bytes] = {}
    left_bytes = MAX_BUNDLE_BYTES
    for info in archive.infolist():
        name = info.filename
        if "/" in name or "\\" in name or name in {"", ".", ".."}:
            raise BundleError(f"The zip holds {name!r}; a bundle's files lie at its top.")
        if name in files:
            raise BundleError(f"The zip holds {name} twice.")
        with archive.open(info) as member:
            files[name] = member.read(left_bytes + 1)
        left_bytes -= len(files[name])
        if left_bytes < 0:
            raise BundleError(f"The bundle is larger than {MAX_BUNDLE_BYTES} bytes.")
    return files


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{place}: {problem['msg']} (got {str(problem['input'])[:80]!r})"
