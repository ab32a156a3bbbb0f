"""What callers and pushers get wrong, over HTTP through the front door: a clear no, and no harm."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping

import httpx
import numpy as np
import pytest
from PIL import ExifTags, Image

from export.bundle import CARD, GOLDEN, HEAD, MANIFEST, Bundle
from serve.client import Prediction
from tests.end_to_end.callers import png
from tests.end_to_end.program import Program
from tests.serve.oracle import Heads, expected_scores, some_picture

pytestmark = pytest.mark.cluster

TASK = "guarded"
PICTURE = some_picture(0)
MOST_GROWTH_BYTES = 100 * 2**20  # the picture bomb would take 900 MB


@pytest.fixture
def guarded(service: Program, heads: Heads) -> Program:
    """The service with the task whose head is that of seed 0, however often it was asked for."""
    with service.client() as client:
        client.push(heads(0, TASK), key="guarded")
    return service


def post(service: Program, path: str, body: bytes, **headers: str) -> httpx.Response:
    """Send bytes as they are."""
    return httpx.post(f"{service.url}{path}", content=body, headers=headers, timeout=60)


def assert_unharmed(service: Program) -> None:
    """The task answers as before, and its history is what it was."""
    with service.client() as client:
        prediction = client.predict(TASK, png(PICTURE))
    assert prediction.version == 1
    assert_scores(prediction, PICTURE)
    assert len(service.view().tasks[TASK]) == 1


def assert_scores(prediction: Prediction, picture: np.ndarray, tolerance: float = 1e-5) -> None:
    """The scores are those of the plain model."""
    scores = list(prediction.scores.values())
    np.testing.assert_allclose(scores, expected_scores(picture, 0), atol=tolerance)


def truncated(data: bytes, _: bytes) -> bytes:
    """The first half."""
    return data[: len(data) // 2]


def flipped(data: bytes, _: bytes) -> bytes:
    """One bit in the middle; of a manifest, in a digest: elsewhere it could still be a bundle."""
    place = data.rfind(b'"sha256"') + 20 if b'"sha256"' in data else len(data) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def missing(_data: bytes, _other: bytes) -> None:
    """Nothing."""


def swapped(_: bytes, other: bytes) -> bytes:
    """The same file of another bundle."""
    return other


def zip_of(files: Mapping[str, bytes | None]) -> bytes:
    """A zip of the files that there are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            if data is not None:
                archive.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [truncated, flipped, missing, swapped])
@pytest.mark.parametrize("name", [MANIFEST, HEAD, GOLDEN, CARD])
def test_a_bundle_with_one_bad_file_is_refused_with_the_reason(
    guarded: Program, heads: Heads, name: str, damage: Callable[[bytes, bytes], bytes | None]
) -> None:
    """Whichever file it is and whatever befell it, what was live stays live."""
    mine, other = (all_files(heads(seed, TASK)) for seed in (1, 2))
    body = zip_of({**mine, name: damage(mine[name], other[name])})

    refused = post(guarded, f"/tasks/{TASK}/versions", body)

    assert refused.status_code == 422, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    problem = refused.json()
    assert [gate["passed"] for gate in problem["gates"]] == [False]
    assert problem["detail"] == problem["gates"][0]["reason"]
    assert any(word in problem["detail"] for word in (*mine, "bundle"))
    assert_unharmed(guarded)


@pytest.mark.parametrize(
    ("name", "damage", "gate"),
    [
        (HEAD, truncated, "graph"),
        (HEAD, swapped, "golden"),
        (GOLDEN, truncated, "golden"),
        (GOLDEN, swapped, "golden"),
    ],
)
def test_a_bad_file_that_the_manifest_vouches_for_is_refused_by_a_gate(
    guarded: Program,
    heads: Heads,
    name: str,
    damage: Callable[[bytes, bytes], bytes],
    gate: str,
) -> None:
    """Digests say that bytes arrived, not that they are any good."""
    mine, other = heads(1, TASK), heads(2, TASK)
    files = {**mine.files, name: damage(mine.files[name], other.files[name])}
    sealed = Bundle.pack(files, **mine.manifest.model_dump(exclude={"files"}))

    refused = post(guarded, f"/tasks/{TASK}/versions", sealed.to_zip())

    assert refused.status_code == 422, refused.text
    verdict = refused.json()["gates"][-1]
    assert (verdict["gate"], verdict["passed"]) == (gate, False)
    assert_unharmed(guarded)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"no zip", 422), (zip_of({}), 422), (b"PK\x05\x06" + bytes(17), 422)],
    ids=["empty", "no zip", "zip of nothing", "cut zip"],
)
def test_what_is_no_bundle_is_refused(guarded: Program, body: bytes, status: int) -> None:
    """Before any of it is stored."""
    refused = post(guarded, f"/tasks/{TASK}/versions", body)

    assert refused.status_code == status
    assert refused.json()["detail"]
    assert_unharmed(guarded)


def jpeg(image: Image.Image, **options: object) -> bytes:
    """The image as a JPEG file of high quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def png_bomb(side_px: int = 30_000) -> bytes:
    """A whole PNG file of white pixels, one bit each; a hundred kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer = zlib.compressobj(1)
    line = b"\0" + b"\xff" * ((side_px + 7) // 8)
    rows = b"".join(packer.compress(line) for _ in range(side_px)) + packer.flush()
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("body", "path", "status", "says"),
    [
        (b"not a picture", f"/predict/{TASK}", 415, "JPEG, PNG, WebP"),
        (b"", f"/predict/{TASK}", 400, "empty"),
        (bytes(17 * 2**20), f"/predict/{TASK}", 413, "16777216 bytes"),
        (jpeg(Image.new("RGB", (64, 64), "red"))[:-200], f"/predict/{TASK}", 415, "truncated"),
        (png(PICTURE), "/predict/guardet", 404, TASK),
        (png(PICTURE), "/predict/..%2f..%2fetc", 404, "/etc"),
        (png(PICTURE), f"/predict/{TASK}?top=none", 400, "top"),
        (png(PICTURE), "/predict?tasks=", 400, "tasks"),
        (png(PICTURE), "/nothing", 404, "/nothing"),
    ],
    ids=[
        "not a picture", "empty", "too many bytes", "truncated JPEG", "task misspelt",
        "task is a path", "malformed option", "no tasks", "no such route",
    ],
)  # fmt: skip
def test_a_bad_request_is_told_what_is_wrong(
    guarded: Program, body: bytes, path: str, status: int, says: str
) -> None:
    """The status of the surface's table, as problem details, through the proxy."""
    refused = post(guarded, path, body)

    assert refused.status_code == status, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["status"] == status
    assert says in refused.json()["detail"]
    assert_unharmed(guarded)


def test_a_picture_bomb_is_refused_before_it_takes_memory(guarded: Program) -> None:
    """900 million pixels in a file of 100 kB, sent often enough to reach both replicas."""
    bomb = png_bomb()
    before = {replica.pid: replica.memory_info().rss for replica in guarded.replicas()}

    refused = [post(guarded, f"/predict/{TASK}", bomb) for _ in range(8)]

    assert {answer.status_code for answer in refused} == {413}
    assert "30000 x 30000" in refused[0].json()["detail"]
    after = {replica.pid: replica.memory_info().rss for replica in guarded.replicas()}
    assert after.keys() == before.keys()
    assert max(after[pid] - before[pid] for pid in after) < MOST_GROWTH_BYTES
    assert_unharmed(guarded)


def test_pictures_of_unusual_kinds_are_understood(guarded: Program) -> None:
    """Four inks, sixteen bits, turned by EXIF: scores are those of the colours that are seen."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(deep, "PNG")
    kinds = {
        # Ink is what is taken away: red 255 - 0, green 255 - 128, blue 255 - 255.
        "CMYK": (jpeg(Image.new("CMYK", (64, 64), (0, 128, 255, 0))), (255, 127, 0)),
        "16 bits": (deep.getvalue(), (128, 128, 128)),
        "turned": (jpeg(Image.new("RGB", (64, 32), (9, 200, 60)), exif=turned), (9, 200, 60)),
    }
    with guarded.client() as client:
        for file, colour in kinds.values():
            prediction = client.predict(TASK, file)

            # JPEG rounds colours by a level or two of 255.
            assert_scores(prediction, np.full((8, 8, 3), colour, np.uint8), 0.02)


def test_damaged_metadata_does_not_spoil_a_picture(guarded: Program) -> None:
    """An EXIF block of garbage counts as none."""
    file = jpeg(Image.fromarray(PICTURE).resize((64, 64)), exif=b"Exif\0\0" + bytes(range(64)))

    assert post(guarded, f"/predict/{TASK}", file).status_code == 200


def all_files(bundle: Bundle) -> dict[str, bytes]:
    """The bundle's files, its manifest among them."""
    return {MANIFEST: bundle.manifest_bytes, **bundle.files}
