"""The contract between learning and serving: what a trunk folder and a bundle are.

A bundle is a handful of files with a `manifest.json` that names the sha256 and size of every other
one; the sha256 of the manifest's own bytes is the bundle's digest. So one digest pins everything,
and how the files travel (a folder, a zip, blobs in an object store) does not matter.
"""

from __future__ import annotations

import hashlib
import io
import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.pictures import Preprocessing

MANIFEST = "manifest.json"
HEAD = "head.onnx"
TAIL = "tail.onnx"
ADAPTER = "adapter.safetensors"
GOLDEN = "golden.safetensors"
HELDOUT = "heldout.safetensors"
CARD = "card.md"
SIGNATURE = "signature.json"  # of the manifest, so not listed in it; sign.py says what it holds
TRUNK_MANIFEST = "trunk.json"
TRUNK_GRAPH = "trunk.onnx"
TRUNK_ADAPTED = "trunk_adapted.onnx"
TRUNK_INT8 = "trunk.int8.onnx"
TRUNK_FP16 = "trunk.fp16.onnx"
STUDENT = "student.safetensors"

Precision = Literal["fp32", "int8", "fp16"]
PRECISION_GRAPHS: Mapping[Precision, str] = {
    "fp32": TRUNK_GRAPH,
    "int8": TRUNK_INT8,
    "fp16": TRUNK_FP16,
}

MAX_BUNDLE_BYTES = 64 * 2**20
MAX_MANIFEST_BYTES = 8 * 2**20  # 20,000 labels in every split take about 4 MB
MAX_SIGNATURE_BYTES = 16 * 2**10
MAX_ZIP_MEMBERS = 64
MAX_ADAPTER_WIDTH = 64
MAX_HELDOUT_BYTES = 32 * 2**20
MAX_HELDOUT_PICTURES = 500

# What each kind of bundle holds beside its manifest.
FILES = {
    "head": frozenset({HEAD, GOLDEN, CARD}),
    "adapter": frozenset({HEAD, ADAPTER, GOLDEN, CARD}),
    "tail": frozenset({TAIL, GOLDEN, CARD}),
}
MAY_HOLD = frozenset({HELDOUT})

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
# Control characters would break headers, metrics and cards.
Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
# No separator and no leading dot: a listed file lies in its folder, whatever a manifest says.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
TaskName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class BundleError(ValueError):
    """A bundle or trunk folder that is not what its manifest says, or not of this format."""


class _Record(BaseModel):
    # NaN would be written as null and never read back. Instances are validated again because
    # `Preprocessing` does not check its own numbers, and its ints have to become floats: the
    # trunk's digest is made of their text.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, revalidate_instances="always"
    )


class FileEntry(_Record):
    """What the manifest says of another file."""

    sha256: Sha256
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
    sha256: Sha256
    num_pictures: dict[str, dict[str, int]] = Field(description="split -> label -> pictures")


class AdapterEntry(_Record):
    """What `adapter.safetensors` holds.

    Args:
        kind: Low rank ("lora", or "adapter" with a ReLU in its middle), or per channel ("ssf"
            scales and shifts, "bias" only shifts).
        width: The rank of the low-rank kinds; 0 for the others.
    """

    kind: Literal["lora", "adapter", "ssf", "bias"]
    width: Annotated[int, Field(ge=0, le=MAX_ADAPTER_WIDTH)] = 0

    @model_validator(mode="after")
    def _has_its_width(self) -> AdapterEntry:
        if (self.kind in {"lora", "adapter"}) != (self.width > 0):
            raise ValueError(f"an adapter of kind {self.kind} has width {self.width}")
        return self


class Provenance(_Record):
    """How an artefact came to be, enough to make it again."""

    command: str
    created_at: str = Field(description="UTC, ISO 8601")
    seed: int
    versions: dict[str, str] = Field(description="package -> version")


class Manifest(_Record):
    """`manifest.json` of a bundle.

    Args:
        thresholds: For each label the least score at which it is given, for heads that give any
            number of labels; None: the label of the best score is given. Not written if None, so
            that services from before there were thresholds read what they always read.
    """

    schema_version: Literal[1] = 1
    task: TaskName
    kind: Literal["head", "adapter", "tail"] = "head"
    adapter: AdapterEntry | None = None
    labels: Annotated[tuple[Label, ...], Field(min_length=2, max_length=100_000)]
    link: Literal["softmax", "sigmoid", "none"] = "softmax"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    thresholds: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None,
        Field(exclude_if=lambda thresholds: thresholds is None),
    ] = None
    trunk: Digest
    num_features: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing
    data: DataFingerprint
    metrics: dict[str, Estimate]
    provenance: Provenance
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _is_complete(self) -> Manifest:
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels are not unique")
        if self.thresholds is not None and self.link != "sigmoid":
            raise ValueError(f"there are thresholds and link is {self.link}, expected sigmoid")
        if self.thresholds is not None and len(self.thresholds) != len(self.labels):
            raise ValueError(
                f"there are {len(self.thresholds)} thresholds and {len(self.labels)} labels"
            )
        if (self.kind == "adapter") != (self.adapter is not None):
            raise ValueError(f"kind is {self.kind} and adapter is {self.adapter}")
        if set(self.files) - MAY_HOLD != FILES[self.kind]:
            raise ValueError(
                f"files are {sorted(self.files)} in a bundle of kind {self.kind}, "
                f"expected {sorted(FILES[self.kind])}"
            )
        return self


class TrunkManifest(_Record):
    """`trunk.json` of a trunk folder."""

    schema_version: Literal[1] = 1
    backbone: str
    cut: str = Field(description="the layer at which the backbone is cut into prefix and suffix")
    num_features: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing
    golden_tolerance: dict[Precision, Annotated[float, Field(gt=0)]] = Field(
        description="precision -> largest difference of a logit that still reproduces, as a share "
        "of the largest absolute logit of the samples or of 1, whichever is more"
    )
    picked: Precision = Field("fp32", description="what a CPU serves unless told otherwise")
    provenance: Provenance
    files: dict[FileName, FileEntry]

    @model_validator(mode="after")
    def _is_complete(self) -> TrunkManifest:
        if TRUNK_GRAPH not in self.files:
            raise ValueError(f"files are {sorted(self.files)}, expected {TRUNK_GRAPH} among them")
        if "fp32" not in self.golden_tolerance:
            raise ValueError("golden_tolerance has no fp32, the precision of the float graph")
        for precision, name in PRECISION_GRAPHS.items():
            if (name in self.files) != (precision in self.golden_tolerance):
                raise ValueError(f"golden_tolerance and files differ on {precision}, {name}")
        if self.picked not in self.precisions:
            raise ValueError(f"picked is {self.picked}, and there is no such graph")
        return self

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions that there is a graph of, fp32 always among them."""
        return tuple(self.golden_tolerance)

    @property
    def digest(self) -> Digest:
        """Digest of the float graphs and the preprocessing: what heads and adapters depend on.

        Precisions are variants of one trunk, and provenance changes nothing that a head sees, so
        neither is part of it.
        """
        graphs = (TRUNK_GRAPH, TRUNK_ADAPTED)
        identity = {
            "graphs": [self.files[name].sha256 for name in graphs if name in self.files],
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

    Args:
        files: Without the manifest and the signature.
        signature: The bytes of `signature.json`, which nobody has checked yet; None: not signed.
    """

    manifest: Manifest
    manifest_bytes: bytes
    files: Mapping[str, bytes]
    signature: bytes | None = None

    @property
    def digest(self) -> Digest:
        """Digest of the manifest's bytes, and through it of every file."""
        return digest_of(self.manifest_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(len(data) for data in self._all_files().values())

    @classmethod
    def pack(cls, files: Mapping[str, bytes], **fields: object) -> Bundle:
        """A new bundle of these files; `fields` are those of `Manifest` but for `files`.

        Raises:
            BundleError: a field is missing, unknown or out of range, or the bundle is too large.
        """
        entries = {name: entry_of(data) for name, data in files.items()}
        try:
            manifest = Manifest.model_validate({**fields, "files": entries})
        except ValidationError as error:
            raise BundleError(f"The manifest is invalid: {_first_problem(error)}.") from error
        # Read back what would be pushed, so that nothing is packed that no one can read.
        return cls.of_files({MANIFEST: manifest.model_dump_json(indent=2).encode(), **files})

    @classmethod
    def of_folder(cls, folder: Path) -> Bundle:
        """Read and check a bundle's folder.

        Raises:
            BundleError: no bundle, or a file missing, extra, changed or too large.
        """
        if not (folder / MANIFEST).is_file():
            raise BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.")
        size_bytes = 0
        files: dict[str, bytes] = {}
        for path in sorted(folder.iterdir()):
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{path.name} is not a plain file; a bundle has no others.")
            size_bytes += path.stat().st_size
            if size_bytes > MAX_BUNDLE_BYTES:
                raise BundleError(f"The bundle is larger than {MAX_BUNDLE_BYTES} bytes.")
            files[path.name] = path.read_bytes()
        return cls.of_files(files)

    @classmethod
    def of_zip(cls, data: bytes) -> Bundle:
        """Read and check a bundle's zip. Names with a folder are refused, so nothing can escape.

        Raises:
            BundleError: no zip, or see `of_folder`.
        """
        # Counted before zipfile makes an object of every entry: 64 MB can list a million of them.
        if data.count(b"PK\x01\x02") > MAX_ZIP_MEMBERS:
            raise BundleError(f"The zip file lists more than {MAX_ZIP_MEMBERS} files.")
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                return cls.of_files(_unzip(archive))
        except BundleError:
            raise
        except _ZIP_ERRORS as error:
            raise BundleError(f"The zip file is damaged, or is none: {error}.") from error

    @classmethod
    def of_files(cls, files: Mapping[str, bytes]) -> Bundle:
        """Check files, `manifest.json` and perhaps `signature.json` among them.

        Raises:
            BundleError: see `of_folder`.
        """
        if MANIFEST not in files:
            raise BundleError(f"The bundle has no {MANIFEST}.")
        if sum(len(data) for data in files.values()) > MAX_BUNDLE_BYTES:
            raise BundleError(f"The bundle is larger than {MAX_BUNDLE_BYTES} bytes.")
        signature = files.get(SIGNATURE)
        if signature is not None and len(signature) > MAX_SIGNATURE_BYTES:
            raise BundleError(f"{SIGNATURE} is larger than {MAX_SIGNATURE_BYTES} bytes.")
        manifest_bytes = files[MANIFEST]
        manifest = read_manifest(manifest_bytes)
        others = {name: data for name, data in files.items() if name not in {MANIFEST, SIGNATURE}}
        check_files(others, manifest.files)
        return cls(manifest, manifest_bytes, others, signature)

    def write(self, folder: Path) -> None:
        """Write the bundle as a folder, made if it is missing; an older bundle is replaced.

        Raises:
            BundleError: the folder holds something else, which would make it no bundle.
        """
        folder.mkdir(parents=True, exist_ok=True)
        ours = {MANIFEST, SIGNATURE, *self.files}
        if others := sorted({path.name for path in folder.iterdir()} - ours):
            raise BundleError(
                f"{folder} holds {others[0]}, which is no file of a bundle; name an empty folder."
            )
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / SIGNATURE).unlink(missing_ok=True)
        # The manifest comes last, so that a folder that has one is whole.
        for name, data in reversed(self._all_files().items()):
            (folder / name).write_bytes(data)

    def to_zip(self) -> bytes:
        """The bundle as a zip file, ready to push; one bundle gives the same bytes every time."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for name, data in self._all_files().items():
                # A ZipInfo of its own has the format's first date instead of the present time.
                archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        return buffer.getvalue()

    def _all_files(self) -> dict[str, bytes]:
        signature = {} if self.signature is None else {SIGNATURE: self.signature}
        return {MANIFEST: self.manifest_bytes, **self.files, **signature}


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


def read_manifest(data: bytes) -> Manifest:
    """Parse a bundle's `manifest.json`.

    Raises:
        BundleError: it is not of this format.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes.")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{MANIFEST} is invalid: {_first_problem(error)}.") from error


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


# What zipfile and zlib raise for damaged bytes; found by mutating zips at random.
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError,
    EOFError, OSError, ValueError,
)  # fmt: skip


def _unzip(archive: zipfile.ZipFile) -> dict[str, bytes]:
    """Read every member, bounded by bytes really inflated and not by what the zip claims."""
    files: dict[str, bytes] = {}
    left_bytes = MAX_BUNDLE_BYTES
    for info in archive.infolist():
        _check_member(info)
        if info.filename in files:
            raise BundleError(f"The zip holds {info.filename} twice.")
        with archive.open(info) as member:
            data = member.read(left_bytes + 1)
        left_bytes -= len(data)
        if left_bytes < 0:
            raise BundleError(f"The bundle is larger than {MAX_BUNDLE_BYTES} bytes.")
        if len(data) != info.file_size:
            raise BundleError(
                f"{info.filename} has {len(data)} bytes, and the zip claims {info.file_size}."
            )
        files[info.filename] = data
    return files


def _check_member(info: zipfile.ZipInfo) -> None:
    """Refuse what a bundle never needs before any byte of it is inflated."""
    name = info.filename
    if "/" in name or "\\" in name or name in {"", ".", ".."}:
        raise BundleError(f"The zip holds {name!r}; a bundle's files lie at its top.")
    # The high half is the Unix mode, 0 where the zip was made elsewhere.
    if stat.S_IFMT(info.external_attr >> 16) not in {0, stat.S_IFREG}:
        raise BundleError(f"{name!r} in the zip is not a plain file; a bundle has no others.")
    # Others (LZMA) may reserve gigabytes at the zip's word.
    if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise BundleError(f"{name!r} in the zip is compressed in another way than deflate.")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{place}: {problem['msg']} (got {str(problem['input'])[:80]!r})"
