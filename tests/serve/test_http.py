"""Predictions over HTTP: every form of request that there is, and every way to be wrong."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from export.bundle import Bundle
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import SIZE_PX, Heads, expected_scores, some_picture

# One colour, so that neither scaling nor JPEG's blocks change what the tiny trunk sees of it.
GREY = (90, 140, 200)
JPEG_TOLERANCE = 0.02  # JPEG and CMYK round a colour to about 2 of 255
MAX_BODY = 100_000


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png_of(seed: int) -> bytes:
    """The oracle's noise as a PNG: lossless, and of the trunk's own size."""
    return encoded(Image.fromarray(some_picture(seed)))


def plain(size: tuple[int, int] = (20, 12)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, GREY)


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[HttpClient]:
    """One replica with two tasks, over HTTP: colours with seed 1, shapes with seed 2."""
    heads = Heads(make_bundle)
    settings = {"max_body_bytes": MAX_BODY, "max_pictures": 3, "max_picture_pixels": 1_000_000}
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(store, trunk_folder, replicas=1, **settings) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        yield HttpClient(fleet, "replica-1")


def problem(response: httpx.Response, status: int) -> str:
    """The detail of a problem, which every error has to be."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    return body["detail"]


def test_a_picture_as_the_body_is_answered(client: HttpClient) -> None:
    """Label, score and scores of every label, by the version that the headers name too."""
    response = client.post("/predict/colours", content=png_of(0))
    body = response.json()
    truth = dict(zip(("red", "green", "blue"), expected_scores(some_picture(0), 1), strict=True))

    assert response.status_code == 200
    assert body["scores"] == pytest.approx(truth, abs=1e-5)
    assert body["label"] == max(truth, key=truth.__getitem__)
    assert body["score"] == body["scores"][body["label"]]
    assert (body["task"], body["version"]) == ("colours", 1)
    assert response.headers["x-headstock-version"] == "1"
    assert response.headers["x-headstock-bundle"] == body["bundle"]


@pytest.mark.parametrize("form", ["multipart", "json"])
def test_a_picture_may_come_as_a_field(client: HttpClient, form: str) -> None:
    """As multipart or as base64 in JSON, the answer is the same."""
    direct = client.post("/predict/colours", content=png_of(0)).json()
    if form == "multipart":
        response = client.post("/predict/colours", files={"image": png_of(0)})
    else:
        text = base64.b64encode(png_of(0)).decode()
        response = client.post("/predict/colours", json={"image": text})

    assert response.json() == direct


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "image/jpeg", ""])
def test_a_picture_is_known_by_its_bytes(client: HttpClient, content_type: str) -> None:
    """`curl --data-binary` calls every body a form, and others name what is not so."""
    direct = client.post("/predict/colours", content=png_of(0)).json()
    headers = {"content-type": content_type}
    told = client.post("/predict/colours", content=png_of(0), headers=headers)

    assert told.json() == direct


def test_several_pictures_are_answered_in_their_order(client: HttpClient) -> None:
    """One result each, as if asked alone."""
    response = client.post("/predict/colours", files=[("image", png_of(s)) for s in (3, 1, 2)])
    alone = [client.post("/predict/colours", content=png_of(s)).json() for s in (3, 1, 2)]

    assert response.json() == {"results": alone}


def test_several_tasks_are_answered_in_their_order(client: HttpClient) -> None:
    """And `*` asks all; each answer is what its task says alone."""
    one = {t: client.post(f"/predict/{t}", content=png_of(0)).json() for t in ("colours", "shapes")}
    two = client.post("/predict?tasks=shapes,colours", content=png_of(0))
    everything = client.post("/predict?tasks=*", content=png_of(0))

    assert two.json() == {"results": [one["shapes"], one["colours"]]}
    assert sorted(r["task"] for r in everything.json()["results"]) == ["colours", "shapes"]


def test_several_pictures_of_several_tasks_name_their_picture(client: HttpClient) -> None:
    """Every pair once."""
    pictures = [("image", png_of(s)) for s in (0, 1)]
    results = client.post("/predict?tasks=colours,shapes", files=pictures).json()["results"]

    assert [(r["picture"], r["task"]) for r in results] == [
        (0, "colours"),
        (0, "shapes"),
        (1, "colours"),
        (1, "shapes"),
    ]


def test_top_limits_the_scores_to_the_best(client: HttpClient) -> None:
    """Best first; more than there are is all of them."""
    everything = client.post("/predict/colours", content=png_of(0)).json()["scores"]
    best = sorted(everything, key=lambda label: -everything[label])

    for top in (1, 2, 3, 99):
        scores = client.post(f"/predict/colours?top={top}", content=png_of(0)).json()["scores"]
        assert list(scores) == best[:top]


@pytest.mark.parametrize("top", ["0", "-1", "1.5", "many", "", "9" * 5000])
def test_a_top_that_is_no_count_is_malformed(client: HttpClient, top: str) -> None:
    """Also one with more digits than Python cares to read."""
    detail = problem(client.post(f"/predict/colours?top={top}", content=png_of(0)), 400)

    assert "expected a whole number of at least 1" in detail


@pytest.mark.parametrize("query", ["", "?tasks=", "?tasks=,", "?tasks=colours,colours"])
def test_tasks_have_to_be_named_once(client: HttpClient, query: str) -> None:
    """None, or one twice, is malformed."""
    problem(client.post(f"/predict{query}", content=png_of(0)), 400)


EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6  # a quarter turn


def halves() -> Image.Image:
    """Upper half one colour, lower half another, twice as high as wide."""
    picture = Image.new("RGB", (16, 32), GREY)
    picture.paste((250, 20, 60), (0, 16, 16, 32))
    return picture


ALIKE = {
    "jpeg": (encoded(plain(), "JPEG", quality=95), plain()),
    "webp": (encoded(plain(), "WEBP", lossless=True), plain()),
    "cmyk": (encoded(plain().convert("CMYK"), "JPEG", quality=95), plain()),
    "palette": (encoded(plain().convert("P", palette=Image.Palette.ADAPTIVE)), plain()),
    "see-through": (
        encoded(Image.new("RGBA", (20, 12), (0, 0, 0, 0))),
        Image.new("RGB", (20, 12), "white"),
    ),
    "16 bit": (
        encoded(Image.fromarray(np.full((12, 20), 120 * 257, np.uint16))),
        Image.new("RGB", (20, 12), (120, 120, 120)),
    ),
    "turned": (
        encoded(halves().rotate(90, expand=True), "JPEG", quality=95, exif=EXIF_TURNED),
        halves(),
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_a_picture_is_answered_like_its_upright_rgb_twin(client: HttpClient, kind: str) -> None:
    """Whatever the file's format, colours, depth or orientation."""
    data, twin = ALIKE[kind]
    scores = client.post("/predict/colours", content=data).json()["scores"]
    expected = client.post("/predict/colours", content=encoded(twin)).json()["scores"]

    assert scores == pytest.approx(expected, abs=JPEG_TOLERANCE)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    pixels = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + header + pixels


def test_a_picture_of_too_many_pixels_is_too_large(client: HttpClient) -> None:
    """By its header, before anything is decoded."""
    detail = problem(client.post("/predict/colours", content=png_header(30_000, 30_000)), 413)

    assert "30000 x 30000 pixels; at most 1000000" in detail


def test_a_long_thin_picture_costs_no_more_than_others(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled until its short side fits, a strip of one pixel would fill the memory."""
    areas: list[int] = []
    resize = Image.Image.resize

    def watched(image: Image.Image, size: tuple[int, int], *rest: Any, **more: Any) -> Image.Image:
        areas.append(size[0] * size[1])
        return resize(image, size, *rest, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    response = client.post("/predict/colours", content=encoded(plain((500_000, 1))))

    assert response.status_code == 200
    assert areas == [SIZE_PX * SIZE_PX]


NOT_PICTURES = {
    "text": b"a picture is worth a thousand words",
    "gif": encoded(plain().convert("P"), "GIF"),
    "truncated jpeg": encoded(plain((200, 200)), "JPEG")[:-200],
    "truncated png": encoded(Image.fromarray(some_picture(0)))[:-30],
    "header only": png_header(10, 10),
}


@pytest.mark.parametrize("kind", NOT_PICTURES)
def test_what_is_no_whole_picture_is_not_accepted(client: HttpClient, kind: str) -> None:
    """Another format, or bytes that end too early."""
    problem(client.post("/predict/colours", content=NOT_PICTURES[kind]), 415)


async def in_pieces(data: bytes) -> AsyncIterator[bytes]:
    """A body without an announced length."""
    for start in range(0, len(data), 10_000):
        yield data[start : start + 10_000]


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_of_too_many_bytes_is_too_large(client: HttpClient, *, is_announced: bool) -> None:
    """By the length it announces, or by what has arrived."""
    body = bytes(MAX_BODY + 1)
    content = body if is_announced else in_pieces(body)
    response = client.post("/predict/colours", content=content)

    assert "content-length" in response.request.headers or not is_announced
    assert f"larger than {MAX_BODY} bytes" in problem(response, 413)


def test_a_body_that_lies_about_its_length_is_cut_off(client: HttpClient) -> None:
    """What counts is what arrives."""
    headers = {"content-length": "10"}
    response = client.post(
        "/predict/colours", content=in_pieces(bytes(MAX_BODY + 1)), headers=headers
    )

    problem(response, 413)


JSON = "application/json"
FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
MALFORMED = {
    "nothing": (b"", "image/png", "The body is empty"),
    "an empty picture in JSON": (b'{"image": ""}', JSON, "picture 1 is empty"),
    "an empty picture in a form": (PART + b"\r\n--x--\r\n", FORM, "picture 1 is empty"),
    "half JSON": (b'{"image": "', JSON, "not JSON"),
    "JSON that is no text": (b"\xff\xfe\x00", JSON, "not JSON"),
    "deep JSON": (b"[" * 50_000, JSON, "nested deeper"),
    "a list": (b"[1]", JSON, 'must be {"image": "<base64>"}'),
    "a number": (b'{"image": 1}', JSON, 'must be {"image": "<base64>"}'),
    "another field": (b'{"img": "AAAA"}', JSON, 'must be {"image": "<base64>"}'),
    "a field more": (b'{"image": "AAAA", "top": 3}', JSON, 'must be {"image": "<base64>"}'),
    "no base64": (b'{"image": "&&&&"}', JSON, "not base64"),
    "base64 that is no ASCII": ('{"image": "ä"}'.encode(), JSON, "not base64"),
    "a form without a boundary": (b"--x", "multipart/form-data", "multipart"),
    "a form of something else": (b"no form at all", FORM, "multipart"),
    "half a form": (PART + b"abc", FORM, "multipart"),
    "a form in no charset": (
        PART.replace(b"image", b"\xff\xfe") + b"a\r\n--x--\r\n",
        "multipart/form-data; boundary=x; charset=base64",
        "multipart",
    ),
    "a form without names": (
        b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n",
        FORM,
        "multipart",
    ),
}


# Starlette leaves the file of a part that never ends to the garbage collector.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*SpooledTemporaryFile")
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_body_is_named_as_such(client: HttpClient, kind: str) -> None:
    """400, with what was expected."""
    body, content_type, reason = MALFORMED[kind]
    headers = {"content-type": content_type}
    detail = problem(client.post("/predict/colours", content=body, headers=headers), 400)

    assert reason in detail


def test_a_form_with_other_fields_is_malformed(client: HttpClient) -> None:
    """The field's name is `image`, and there is no other."""
    wrong = client.post("/predict/colours", files={"picture": png_of(0)})
    more = client.post("/predict/colours", files={"image": png_of(0)}, data={"top": "3"})

    assert "no field named 'image'" in problem(wrong, 400)
    assert "Field 'top' is unknown" in problem(more, 400)


@pytest.mark.parametrize("num_texts", [0, 2])
def test_too_many_pictures_are_malformed(client: HttpClient, num_texts: int) -> None:
    """Three are accepted here, however the fields are made up."""
    files = [("image", png_of(s)) for s in range(4 - num_texts)]
    texts = {"image": ["text"] * num_texts}

    problem(client.post("/predict/colours", files=files, data=texts), 400)


def test_one_bad_picture_among_good_ones_refuses_the_request(client: HttpClient) -> None:
    """No half answers."""
    files = [("image", png_of(0)), ("image", b"no picture")]

    problem(client.post("/predict/colours", files=files), 415)


def test_an_unknown_task_is_not_found_and_the_closest_are_named(client: HttpClient) -> None:
    """For one task and among several."""
    one = problem(client.post("/predict/color", content=png_of(0)), 404)
    several = problem(client.post("/predict?tasks=shapes,shape", content=png_of(0)), 404)

    assert "no task 'color'. The closest names are: colours" in one
    assert "no task 'shape'. The closest names are: shapes" in several


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/predict/a/b", "/tasks/colours/nothing", "/tasks/"]
)
def test_an_unknown_path_is_not_found(client: HttpClient, path: str) -> None:
    """As a problem like all others."""
    assert path in problem(client.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/predict/colours", {"POST"}),
        ("DELETE", "/tasks", {"GET", "HEAD"}),
        ("PUT", "/tasks/colours/rollback", {"POST"}),
    ],
)
def test_a_wrong_method_is_not_allowed(
    client: HttpClient, method: str, path: str, allowed: set[str]
) -> None:
    """The answer names those that are."""
    response = client.request(method, path)

    assert method in problem(response, 405)
    assert set(response.headers["allow"].split(", ")) == allowed
