"""What a bundle and a trunk folder are, and that nothing else is taken for one."""

from __future__ import annotations

import io
import json
import random
import shutil
import stat
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import bundle as bundle_module
from export.bundle import (
    CARD,
    GOLDEN,
    HEAD,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_SIGNATURE_BYTES,
    SIGNATURE,
    STUDENT,
    TRUNK_GRAPH,
    TRUNK_INT8,
    TRUNK_MANIFEST,
    Bundle,
    BundleError,
    TrunkManifest,
    digest_of,
    entry_of,
    read_trunk_folder,
    read_trunk_manifest,
)
from models.pictures import Preprocessing

FILES = {
    HEAD: b"a head graph " + bytes(range(256)),
    GOLDEN: b"pictures and logits " * 20,
    CARD: b"# A card\n",
}
PREPROCESSING = Preprocessing(32, 40, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
PROVENANCE = {
    "command": "headstock head data",
    "created_at": "2026-11-21T09:00:00+00:00",
    "seed": 0,
    "versions": {"torch": "2.12.1"},
}
FIELDS: dict[str, Any] = {
    "task": "fruit",
    "labels": ("apple", "pear"),
    "trunk": digest_of(b"trunk"),
    "num_features": 8,
    "preprocessing": PREPROCESSING,
    "data": {
        "name": "fruit",
        "sha256": "0" * 64,
        "num_pictures": {"train": {"apple": 3, "pear": 4}},
    },
    "metrics": {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95, "num_samples": 50}},
    "provenance": PROVENANCE,
}


def pack(**changes: object) -> Bundle:
    """A small bundle, with some fields of its manifest changed."""
    return Bundle.pack(FILES, **{**FIELDS, **changes})


def all_files(bundle: Bundle) -> dict[str, bytes]:
    """Every file of a bundle, its manifest among them."""
    return {MANIFEST: bundle.manifest_bytes, **bundle.files}


def edited(**changes: object) -> dict[str, bytes]:
    """The bundle's files with fields of the manifest's JSON replaced or added."""
    bundle = pack()
    manifest = json.loads(bundle.manifest_bytes) | changes
    return all_files(bundle) | {MANIFEST: json.dumps(manifest).encode()}


def zip_of(members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> bytes:
    """A zip of these members, duplicates allowed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name", category=UserWarning)
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def zip_members() -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    """The members of a good zip."""
    return list(all_files(pack()).items())


# Round trips


def test_a_bundle_keeps_its_digest_as_folder_zip_and_files(tmp_path: Path) -> None:
    """How the files travel does not matter."""
    bundle = pack()
    bundle.write(tmp_path / "bundle")

    copies = [
        Bundle.of_folder(tmp_path / "bundle"),
        Bundle.of_zip(bundle.to_zip()),
        Bundle.of_files(all_files(bundle)),
    ]
    assert [copy.digest for copy in copies] == [bundle.digest] * 3
    assert copies == [bundle] * 3


def test_a_signature_travels_with_its_bundle_and_is_no_part_of_the_digest(tmp_path: Path) -> None:
    """Through folder, zip and files, byte for byte; an older one does not stay behind."""
    bundle = replace(pack(), signature=b"some bytes")
    bundle.write(tmp_path)
    copies = [
        Bundle.of_folder(tmp_path),
        Bundle.of_zip(bundle.to_zip()),
        Bundle.of_files({**all_files(bundle), SIGNATURE: b"some bytes"}),
    ]
    pack().write(tmp_path)

    assert copies == [bundle] * 3
    assert bundle.digest == pack().digest
    assert bundle.size_bytes == pack().size_bytes + len(b"some bytes")
    assert Bundle.of_folder(tmp_path) == pack()


def test_a_signature_has_a_bound() -> None:
    """16 KiB are many times what one takes."""
    most = {**all_files(pack()), SIGNATURE: bytes(MAX_SIGNATURE_BYTES)}

    assert Bundle.of_files(most).signature == bytes(MAX_SIGNATURE_BYTES)
    with pytest.raises(BundleError, match=r"signature\.json is larger than 16384 bytes"):
        Bundle.of_files({**most, SIGNATURE: bytes(MAX_SIGNATURE_BYTES + 1)})


def test_a_manifest_cannot_list_a_signature() -> None:
    """It would be a signature of itself."""
    with pytest.raises(BundleError, match="files are"):
        Bundle.pack({**FILES, SIGNATURE: b"x"}, **FIELDS)


def test_the_digest_is_that_of_the_manifests_bytes() -> None:
    """Anyone can compute it with sha256sum."""
    bundle = pack()

    assert bundle.digest == digest_of(bundle.manifest_bytes)


def test_the_digest_changes_with_any_file_and_any_field() -> None:
    """One digest pins everything."""
    digests = {
        pack().digest,
        pack(temperature=2.0).digest,
        pack(labels=("pear", "apple")).digest,
        Bundle.pack({**FILES, CARD: b"another"}, **FIELDS).digest,
    }

    assert len(digests) == 4


def test_a_bundle_zips_to_the_same_bytes_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock is in the zip."""
    first = pack().to_zip()
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)

    assert pack().to_zip() == first


def test_writing_replaces_an_older_bundle(tmp_path: Path) -> None:
    """The same --out may be used again."""
    pack().write(tmp_path)
    newer = pack(temperature=3.0)
    newer.write(tmp_path)

    assert Bundle.of_folder(tmp_path).digest == newer.digest


def test_writing_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    """What is written can be read again, and nothing of the user's is mixed in."""
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(BundleError, match=r"holds notes\.txt.*name an empty folder"):
        pack().write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_write_that_breaks_off_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the new one nor a mixture: the manifest goes first and comes last."""
    pack().write(tmp_path)
    write_bytes = Path.write_bytes

    def write_or_break(path: Path, data: bytes) -> int:
        if path.name == GOLDEN:
            raise OSError("disk full")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_or_break)
    with pytest.raises(OSError, match="disk full"):
        pack(temperature=3.0).write(tmp_path)

    with pytest.raises(BundleError, match="is not a bundle"):
        Bundle.of_folder(tmp_path)


def test_the_format_is_read_without_torch() -> None:
    """Serving has no torch; of this repository, only the decoder and its bounds are imported."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "import export.bundle\n"
        "print(sorted(m for m in sys.modules if m.startswith(('models.', 'export.'))))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    decoder = ["models.picture_parts", "models.pictures"]
    assert done.stdout.strip() == str(["export.bundle", *decoder])


# Damage to a file


def truncated(data: bytes) -> bytes:
    return data[:-1]


def extended(data: bytes) -> bytes:
    return data + b"\0"


def flipped(data: bytes) -> bytes:
    return data[:5] + bytes([data[5] ^ 1]) + data[6:]


def emptied(_data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [truncated, extended, flipped, emptied])
@pytest.mark.parametrize("name", [HEAD, GOLDEN, CARD])
def test_a_damaged_file_is_named(name: str, damage: Callable[[bytes], bytes]) -> None:
    """Every byte of every file is checked."""
    files = all_files(pack())

    with pytest.raises(BundleError, match=f"^{name} is damaged"):
        Bundle.of_files({**files, name: damage(files[name])})


@pytest.mark.parametrize("name", [MANIFEST, HEAD, GOLDEN, CARD])
def test_a_missing_file_is_named(name: str) -> None:
    """A bundle is whole or none."""
    files = all_files(pack())
    del files[name]

    with pytest.raises(BundleError, match=name):
        Bundle.of_files(files)


def test_an_extra_file_is_named() -> None:
    """Nothing rides along unseen."""
    with pytest.raises(BundleError, match=r"^evil\.sh is not listed in the manifest"):
        Bundle.of_files({**all_files(pack()), "evil.sh": b"#!"})


@pytest.mark.parametrize("name", [HEAD, GOLDEN, CARD])
def test_a_file_of_another_bundle_is_named(name: str) -> None:
    """Files of two good bundles do not mix."""
    other = Bundle.pack({key: data + b"!" for key, data in FILES.items()}, **FIELDS)

    with pytest.raises(BundleError, match=f"^{name} is damaged"):
        Bundle.of_files({**all_files(pack()), name: other.files[name]})


def test_a_file_of_the_same_size_and_other_bytes_is_refused() -> None:
    """The hash decides, not the size."""
    files = all_files(pack())
    files[CARD] = files[CARD].swapcase()

    with pytest.raises(BundleError, match=CARD):
        Bundle.of_files(files)


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
def test_a_damaged_manifest_is_named(damage: Callable[[bytes], bytes]) -> None:
    """Its message says where, not just that."""
    files = all_files(pack())

    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.of_files({**files, MANIFEST: damage(files[MANIFEST])})


def test_a_manifest_changed_bit_by_bit_is_refused_or_has_another_digest() -> None:
    """A flip may give a valid manifest (another label); it is then another bundle."""
    bundle = pack()
    for place in range(len(bundle.manifest_bytes)):
        for bit in range(8):
            data = bytearray(bundle.manifest_bytes)
            data[place] ^= 1 << bit
            try:
                found = Bundle.of_files({**bundle.files, MANIFEST: bytes(data)})
            except BundleError:
                continue
            assert found.digest != bundle.digest


# Folders


def test_a_folder_without_manifest_is_no_bundle(tmp_path: Path) -> None:
    """The message names the folder and what it lacks."""
    with pytest.raises(BundleError, match=rf"{tmp_path.name} is not a bundle.*{MANIFEST}"):
        Bundle.of_folder(tmp_path)


def test_a_symlink_in_a_folder_is_refused(tmp_path: Path) -> None:
    """Even to the right bytes: a bundle does not point outside itself."""
    pack().write(tmp_path / "bundle")
    shutil.move(tmp_path / "bundle" / HEAD, tmp_path / "elsewhere")
    (tmp_path / "bundle" / HEAD).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(BundleError, match=f"^{HEAD} is not a plain file"):
        Bundle.of_folder(tmp_path / "bundle")


def test_a_folder_within_a_bundle_is_refused(tmp_path: Path) -> None:
    """A bundle is flat."""
    pack().write(tmp_path)
    (tmp_path / "more").mkdir()

    with pytest.raises(BundleError, match=r"^more is not a plain file"):
        Bundle.of_folder(tmp_path)


def test_a_large_folder_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is known without reading."""
    pack().write(tmp_path)
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 5)

    def fail(_path: Path) -> bytes:
        pytest.fail("was read")

    monkeypatch.setattr(Path, "read_bytes", fail)

    with pytest.raises(BundleError, match="larger than 5 bytes"):
        Bundle.of_folder(tmp_path)


# Zips


@pytest.mark.parametrize(
    "name",
    [
        "../head.onnx", "/etc/passwd", "bundle/head.onnx", "..\\head.onnx", "C:\\head.onnx", "..",
        ".", "folder/",
    ],
)  # fmt: skip
def test_a_zip_member_with_a_path_is_refused(name: str) -> None:
    """Nothing can escape, because nothing has a folder."""
    with pytest.raises(BundleError, match="lie at its top"):
        Bundle.of_zip(zip_of([*zip_members(), (name, b"")]))


def test_a_zip_with_a_name_twice_is_refused() -> None:
    """Else two readers could see two bundles in one zip."""
    with pytest.raises(BundleError, match=f"holds {HEAD} twice"):
        Bundle.of_zip(zip_of([*zip_members(), (HEAD, b"another")]))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO])
def test_a_zip_member_that_is_no_plain_file_is_refused(kind: int) -> None:
    """A link with the right bytes is refused as well."""
    link = zipfile.ZipInfo(HEAD)
    link.external_attr = (kind | 0o777) << 16
    members = [(link if name == HEAD else name, data) for name, data in zip_members()]

    with pytest.raises(BundleError, match=f"'{HEAD}' in the zip is not a plain file"):
        Bundle.of_zip(zip_of(members))


def test_a_zip_made_on_a_file_system_is_read(tmp_path: Path) -> None:
    """Real tools store modes and dates."""
    pack().write(tmp_path / "bundle")
    made = shutil.make_archive(str(tmp_path / "bundle"), "zip", tmp_path / "bundle")
    members = [
        (info, data)
        for info, data in _members_of(Path(made).read_bytes())
        if not info.filename.endswith("/")
    ]

    assert Bundle.of_zip(zip_of([*members])).digest == pack().digest


def test_an_encrypted_zip_is_refused() -> None:
    """The flag is set in both of the member's headers, as an encrypting tool does."""
    data = bytearray(pack().to_zip())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1

    with pytest.raises(BundleError, match="is encrypted"):
        Bundle.of_zip(bytes(data))


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_zip_compressed_in_another_way_is_refused(method: int) -> None:
    """LZMA may ask for gigabytes before the first byte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in all_files(pack()).items():
            archive.writestr(name, data)

    with pytest.raises(BundleError, match="another way than deflate"):
        Bundle.of_zip(buffer.getvalue())


def test_a_zip_that_claims_more_bytes_than_a_member_has_is_refused() -> None:
    """It was made to mislead somebody, if not this reader."""
    data = bytearray(pack().to_zip())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (10**9).to_bytes(4, "little")
    size = len(pack().manifest_bytes)

    with pytest.raises(
        BundleError, match=f"manifest.json has {size} bytes, and the zip claims 1000000000"
    ):
        Bundle.of_zip(bytes(data))


def test_a_stored_zip_is_read() -> None:
    """Compression is optional."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in all_files(pack()).items():
            archive.writestr(name, data)

    assert Bundle.of_zip(buffer.getvalue()).digest == pack().digest


def test_a_zip_bomb_is_refused_without_inflating_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MiB of zeros in 64 KiB: memory stays near the bound, here 1 MiB."""
    bomb = zip_of([*zip_members(), ("zeros", bytes(64 * 2**20))])
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 2**20)

    tracemalloc.start()
    with pytest.raises(BundleError, match=f"larger than {2**20} bytes"):
        Bundle.of_zip(bomb)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak_bytes < 8 * 2**20


def test_members_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many members below the bound are no way around it."""
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 2**20)

    with pytest.raises(BundleError, match="larger than"):
        Bundle.of_zip(zip_of([(f"part{i}", bytes(2**19)) for i in range(3)]))


def test_a_member_larger_than_it_claims_is_refused() -> None:
    """The claim in the headers is not what bounds or ends the reading."""
    data = bytearray(pack().to_zip())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (10).to_bytes(4, "little")

    with pytest.raises(BundleError):
        Bundle.of_zip(bytes(data))


def test_a_zip_with_a_million_members_is_refused_before_they_are_listed() -> None:
    """Listing them would take minutes and gigabytes."""
    entry = b"PK\x01\x02" + bytes(42)

    with pytest.raises(BundleError, match="more than 64 files"):
        Bundle.of_zip(entry * 2**20)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_zip_is_refused(data: bytes) -> None:
    """Empty bodies, other files, and the empty zip."""
    with pytest.raises(BundleError):
        Bundle.of_zip(data)


def test_a_mutated_zip_is_the_same_bundle_or_refused() -> None:
    """10,000 zips with random bytes changed, cut, doubled or dropped; nothing else is raised."""
    rng = random.Random(0)  # noqa: S311
    bundle = pack()
    good = bundle.to_zip()
    refused = 0
    for _ in range(10_000):
        try:
            assert Bundle.of_zip(_mutated(good, rng)) == bundle
        except BundleError:
            refused += 1

    # Both outcomes happen: dates and attributes may change without harm.
    assert 5_000 < refused < 10_000


def _mutated(good: bytes, rng: random.Random) -> bytes:
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    # Half of all changes go to the headers at the end, where the parser's decisions are.
    start = rng.randrange(len(data) - 250, len(data))
    kind = rng.randrange(8)
    if kind == 0:
        del data[start:]
    elif kind == 1:
        del data[start : start + rng.randrange(1, 9)]
    elif kind <= 4:
        data[start] = rng.randrange(256)
    return bytes(data)


def _members_of(data: bytes) -> list[tuple[zipfile.ZipInfo, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info, archive.read(info)) for info in archive.infolist()]


# The manifest's fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("task", "Fruit"),
        ("task", "fruit\n"),
        ("task", "../fruit"),
        ("task", "a" * 64),
        ("task", ""),
        ("kind", "trunk"),
        ("labels", ["apple"]),
        ("labels", ["apple", "apple"]),
        ("labels", ["apple", ""]),
        ("labels", ["apple", "pear\nx-admin: 1"]),
        ("labels", ["apple", "p" * 201]),
        ("labels", "ab"),
        ("link", "tanh"),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("trunk", "0" * 64),
        ("trunk", "sha256:" + "G" * 64),
        ("trunk", "sha256:" + "0" * 64 + "\n"),
        ("num_features", 0),
        ("num_features", 8.5),
        ("metrics", {"accuracy": {"value": float("nan"), "low": 0, "high": 1, "num_samples": 5}}),
        ("metrics", {"accuracy": {"value": 0.5, "low": 0, "high": 1, "num_samples": 0}}),
        ("provenance", {"command": "x"}),
        ("surprise", 1),
    ],
)
def test_a_field_out_of_range_is_named_when_packed_and_when_read(field: str, value: object) -> None:
    """What `pack` refuses is refused when read as well, so neither side has to trust the other."""
    with pytest.raises(BundleError, match=rf"^The manifest is invalid: .*{field}"):
        pack(**{field: value})
    with pytest.raises(BundleError, match=rf"^{MANIFEST} is invalid: .*{field}"):
        Bundle.of_files(edited(**{field: value}))


@pytest.mark.parametrize("task", ["a", "0-9_x", "a" * 63])
def test_a_task_name_of_the_documented_form_is_accepted(task: str) -> None:
    """`[a-z0-9][a-z0-9_-]{0,62}`."""
    assert pack(task=task).manifest.task == task


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_a_field_that_is_missing_is_named(field: str) -> None:
    """Nothing that matters has a default."""
    manifest = json.loads(pack().manifest_bytes)
    del manifest[field]
    files = all_files(pack()) | {MANIFEST: json.dumps(manifest).encode()}

    with pytest.raises(BundleError, match=f"{field}: Field required"):
        Bundle.of_files(files)


@pytest.mark.parametrize(
    "preprocessing",
    [
        {"size_px": 40, "resize_px": 32, "mean": [0, 0, 0], "std": [1, 1, 1]},
        {"size_px": 32, "resize_px": 32, "mean": [0, 0, 0], "std": [1, 1, 0]},
        {"size_px": 32, "resize_px": 32, "mean": [0, 0], "std": [1, 1, 1]},
        {"size_px": 32, "resize_px": 32, "mean": [0, 0, float("nan")], "std": [1, 1, 1]},
        {"size_px": 32, "resize_px": 32, "mean": [0, 0, 0], "std": [1, 1, 1], "crop": 1},
    ],
)
def test_preprocessing_out_of_range_is_refused(preprocessing: dict[str, object]) -> None:
    """The decoder's own checks hold for what is read from JSON."""
    with pytest.raises(BundleError, match=f"{MANIFEST} is invalid: preprocessing"):
        Bundle.of_files(edited(preprocessing=preprocessing))


def test_preprocessing_that_is_not_finite_is_refused_when_packed() -> None:
    """An instance made in Python is checked like one that was read."""
    odd = Preprocessing(32, 32, (float("nan"), 0.0, 0.0), (1.0, 1.0, 1.0))

    with pytest.raises(BundleError, match="preprocessing"):
        pack(preprocessing=odd)


def test_files_are_exactly_those_of_the_format() -> None:
    """A head bundle has a graph, golden samples and a card."""
    with pytest.raises(BundleError, match="files are"):
        Bundle.pack({HEAD: b"", GOLDEN: b""}, **FIELDS)
    with pytest.raises(BundleError, match="files are"):
        Bundle.pack({**FILES, "more": b""}, **FIELDS)


def test_deep_json_is_refused() -> None:
    """No recursion error reaches the caller."""
    with pytest.raises(BundleError, match=MANIFEST):
        Bundle.of_files({MANIFEST: b'{"task":' + b"[" * 100_000})


def test_a_huge_manifest_is_refused() -> None:
    """Before it is parsed."""
    with pytest.raises(BundleError, match=f"{MANIFEST} is larger than"):
        Bundle.of_files({MANIFEST: b" " * (MAX_MANIFEST_BYTES + 1)})


def test_a_bundle_too_large_to_be_read_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who exports learns it, not the one who pushes."""
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 1_000)

    with pytest.raises(BundleError, match="larger than 1000 bytes"):
        Bundle.pack({**FILES, HEAD: bytes(1_000)}, **FIELDS)


def test_twenty_thousand_labels_fit() -> None:
    """ImageNet-21k's number of classes, counted in three splits."""
    labels = tuple(f"a class with a long name, number {i}" for i in range(21_000))
    counts = dict.fromkeys(labels, 12)
    data = FIELDS["data"] | {"num_pictures": dict.fromkeys(("train", "validation", "test"), counts)}

    assert pack(labels=labels, data=data).manifest.labels == labels


# Trunks

GRAPH = b"a trunk graph"


def trunk_manifest(**changes: Any) -> TrunkManifest:
    """The manifest of a small trunk."""
    fields = {
        "backbone": "small32",
        "cut": "features.3",
        "num_features": 8,
        "preprocessing": PREPROCESSING,
        "golden_tolerance": {"fp32": 1e-3},
        "provenance": PROVENANCE,
        "files": {TRUNK_GRAPH: entry_of(GRAPH), STUDENT: entry_of(b"weights")},
    }
    return TrunkManifest.model_validate({**fields, **changes})


def write_trunk(folder: Path, manifest: TrunkManifest) -> None:
    """A trunk's folder."""
    (folder / TRUNK_GRAPH).write_bytes(GRAPH)
    (folder / STUDENT).write_bytes(b"weights")
    (folder / TRUNK_MANIFEST).write_text(manifest.model_dump_json())


def test_a_trunk_folder_is_read_with_or_without_the_students_weights(tmp_path: Path) -> None:
    """Serving is not sent what only training needs."""
    manifest = trunk_manifest()
    write_trunk(tmp_path, manifest)
    assert read_trunk_folder(tmp_path) == (manifest, {TRUNK_GRAPH: GRAPH, STUDENT: b"weights"})

    (tmp_path / STUDENT).unlink()
    assert read_trunk_folder(tmp_path) == (manifest, {TRUNK_GRAPH: GRAPH})


@pytest.mark.parametrize("name", [TRUNK_GRAPH, STUDENT])
def test_a_damaged_file_of_a_trunk_is_named(tmp_path: Path, name: str) -> None:
    """The student's weights too, where they are there."""
    write_trunk(tmp_path, trunk_manifest())
    (tmp_path / name).write_bytes(b"damaged")

    with pytest.raises(BundleError, match=f"^{name} is damaged"):
        read_trunk_folder(tmp_path)


def test_a_trunk_without_its_graph_is_refused(tmp_path: Path) -> None:
    """The message names the file."""
    write_trunk(tmp_path, trunk_manifest())
    (tmp_path / TRUNK_GRAPH).unlink()

    with pytest.raises(BundleError, match=f"^{TRUNK_GRAPH} is listed in the manifest but missing"):
        read_trunk_folder(tmp_path)


def test_a_folder_without_trunk_json_is_no_trunk(tmp_path: Path) -> None:
    """A half-written one, for instance."""
    (tmp_path / TRUNK_GRAPH).write_bytes(GRAPH)

    with pytest.raises(BundleError, match=f"is not a trunk: it has no {TRUNK_MANIFEST}"):
        read_trunk_folder(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", ""])
def test_a_trunk_lists_no_file_outside_its_folder(name: str) -> None:
    """A trunk that was fetched cannot name the files of this machine."""
    manifest = json.loads(trunk_manifest().model_dump_json())
    manifest["files"][name] = manifest["files"][TRUNK_GRAPH]

    with pytest.raises(BundleError, match=f"{TRUNK_MANIFEST} is invalid: files"):
        read_trunk_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize(
    "golden_tolerance", [{}, {"int8": 0.1}, {"fp32": 0.0}, {"fp32": float("nan")}, {"fp64": 1.0}]
)
def test_a_trunk_states_a_usable_tolerance(golden_tolerance: dict[str, float]) -> None:
    """Above 0, a number, and always for the float graph."""
    manifest = json.loads(trunk_manifest().model_dump_json())
    manifest["golden_tolerance"] = golden_tolerance

    with pytest.raises(BundleError, match="golden_tolerance"):
        read_trunk_manifest(json.dumps(manifest).encode())


def with_int8(**changes: Any) -> TrunkManifest:
    """The same trunk with a variant."""
    return trunk_manifest(
        files=trunk_manifest().files | {TRUNK_INT8: entry_of(b"int8")},
        golden_tolerance={"fp32": 1e-3, "int8": 0.1},
        **changes,
    )


def test_a_trunk_names_its_precisions() -> None:
    """The float graph is always there, and is what is picked unless said otherwise."""
    assert (trunk_manifest().precisions, trunk_manifest().picked) == (("fp32",), "fp32")
    assert with_int8().precisions == ("fp32", "int8")
    assert with_int8(picked="int8").picked == "int8"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"picked": "int8"}, "picked is int8"),
        ({"golden_tolerance": {"fp32": 1e-3, "fp16": 0.1}}, r"fp16, trunk\.fp16\.onnx"),
        ({"files": {TRUNK_GRAPH: entry_of(GRAPH), TRUNK_INT8: entry_of(b"i")}}, "differ on int8"),
    ],
)
def test_a_variant_is_a_graph_and_its_tolerance(changes: dict[str, Any], reason: str) -> None:
    """One without the other, or a variant picked that is not there, is refused."""
    with pytest.raises(ValueError, match=reason):
        trunk_manifest(**changes)


def test_a_trunks_digest_is_of_graph_and_preprocessing() -> None:
    """Provenance and variants change nothing that a head sees; these two do."""
    manifest = trunk_manifest()
    other_size = Preprocessing(32, 41, PREPROCESSING.mean, PREPROCESSING.std)
    other_mean = Preprocessing(32, 40, (0.0, 0.0, 0.0), PREPROCESSING.std)
    files = manifest.files

    assert trunk_manifest(provenance=PROVENANCE | {"seed": 9}).digest == manifest.digest
    assert with_int8(picked="int8").digest == manifest.digest
    assert trunk_manifest(preprocessing=other_size).digest != manifest.digest
    assert trunk_manifest(preprocessing=other_mean).digest != manifest.digest
    assert trunk_manifest(files=files | {TRUNK_GRAPH: entry_of(b"g")}).digest != manifest.digest


def test_a_trunks_digest_survives_being_written_and_read() -> None:
    """Also where a mean is a whole number, which JSON could write in two ways."""
    manifest = trunk_manifest(
        preprocessing={"size_px": 32, "resize_px": 32, "mean": (127, 0, -0.5), "std": (1, 2, 3)}
    )

    assert read_trunk_manifest(manifest.model_dump_json(indent=1).encode()).digest == (
        manifest.digest
    )


def test_a_trunk_made_in_python_is_checked_like_one_that_is_read() -> None:
    """Also its preprocessing, a dataclass that looks at its numbers only roughly."""
    odd = Preprocessing(32, 40, PREPROCESSING.mean, (1.0, 1.0, float("nan")))

    with pytest.raises(ValueError, match="finite"):
        trunk_manifest(preprocessing=odd)
