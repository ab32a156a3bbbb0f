"""The binary tensor extension: raw tensors behind JSON, one raw tensor alone, and compression."""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from export.bundle import Bundle
from serve.http.oip.compress import accepted_encoding
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import SIZE_PX, Heads, expected_scores, some_picture
from tests.serve.test_http import MAX_BODY, encoded, plain, png_of
from tests.serve.test_http_oip import INFER, LABELS, error, features_of, image

LENGTH = "inference-header-content-length"
RAW_OUTPUTS = {"binary_data_output": True}


@pytest.fixture(scope="module")
def client(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[HttpClient]:
    """One replica with one task: colours with seed 1."""
    heads = Heads(make_bundle)
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(
        store, trunk_folder, replicas=1, max_body_bytes=MAX_BODY, max_pictures=3
    ) as fleet:
        fleet.must_push(heads(1))
        yield HttpClient(fleet, "replica-1")


def framed(*elements: bytes) -> bytes:
    """Elements as the extension sends them."""
    return b"".join(struct.pack("<I", len(data)) + data for data in elements)


def raw_request(
    name: str, datatype: str, shape: list[int], raw: bytes, **fields: Any
) -> tuple[bytes, dict[str, str]]:
    """A body with one raw tensor, and its header."""
    parameters = {"binary_data_size": len(raw)}
    given = {"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}
    header = json.dumps({"inputs": [given], **fields}).encode()
    return header + raw, {LENGTH: str(len(header))}


def raw_pictures(*pictures: bytes, **fields: Any) -> tuple[bytes, dict[str, str]]:
    """A body with encoded pictures as they are."""
    return raw_request("image", "BYTES", [len(pictures)], framed(*pictures), **fields)


def post(client: HttpClient, sent: tuple[bytes, dict[str, str]], path: str = INFER) -> Any:
    """Send a body with its headers."""
    body, headers = sent
    return client.post(path, content=body, headers=headers)


def raw_answer(response: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """The JSON part and what follows it."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/octet-stream"
    length = int(response.headers[LENGTH])
    return json.loads(response.content[:length]), response.content[length:]


def scores_of(seed: int) -> np.ndarray:
    """What the head says of the oracle's noise."""
    return expected_scores(some_picture(seed), 1)


def test_pictures_may_follow_the_json(client: HttpClient) -> None:
    """The answer is that to the same pictures as base64."""
    raw = post(client, raw_pictures(png_of(0), png_of(1)))

    assert LENGTH not in raw.headers
    assert raw.headers["content-type"] == "application/json"
    assert raw.json() == client.post(INFER, json=image(png_of(0), png_of(1))).json()


@pytest.mark.parametrize("kind", ["application/json", "application/octet-stream", "image/png"])
def test_the_length_header_says_the_form_whatever_the_content_type(
    client: HttpClient, kind: str
) -> None:
    """Clients send any, or none."""
    body, headers = raw_pictures(png_of(0))
    told = {**headers, "content-type": kind}
    alone = {LENGTH: "0", "content-type": kind}

    assert post(client, (body, told)).json() == post(client, (body, headers)).json()
    found = raw_answer(client.post(INFER, content=png_of(0), headers=alone))
    assert found == raw_answer(client.post(INFER, content=png_of(0), headers={LENGTH: "0"}))


def test_arrays_may_follow_the_json(client: HttpClient) -> None:
    """Row-major, and little-endian."""
    pixels = np.stack([some_picture(0), some_picture(1)])
    features = np.stack([features_of(0), features_of(1)])
    shape = [2, SIZE_PX, SIZE_PX, 3]
    flat = features.ravel().tolist()
    sent = {
        "pixels": raw_request("pixels", "UINT8", shape, bytes(pixels.ravel().tolist())),
        "features": raw_request("features", "FP32", [2, 3], struct.pack("<6f", *flat)),
    }
    for kind, request in sent.items():
        response = post(client, request, f"/v2/models/colours.{kind}/infer")
        found = response.json()["outputs"][0]["data"]
        np.testing.assert_allclose(found, np.ravel([scores_of(0), scores_of(1)]), atol=1e-5)


def test_outputs_may_follow_the_json(client: HttpClient) -> None:
    """In their order, each with its size; the numbers are those of the JSON to the last bit."""
    body, headers = raw_pictures(png_of(0), png_of(1), parameters=RAW_OUTPUTS)
    response = post(client, (body, headers))
    header, raw = raw_answer(response)
    plain_answer = client.post(INFER, json=image(png_of(0), png_of(1))).json()["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in header["outputs"]]

    assert all("data" not in output for output in header["outputs"])
    assert sizes[0] == 24
    assert sum(sizes) == len(raw)
    assert [*struct.unpack("<6f", raw[:24])] == plain_answer[0]["data"]
    assert raw[24:] == framed(*(label.encode() for label in plain_answer[1]["data"]))


def test_an_outputs_own_wish_goes_before_the_requests(client: HttpClient) -> None:
    """In both directions."""
    wanted = [
        {"name": "label", "parameters": {"binary_data": False}},
        {"name": "scores"},
    ]
    header, raw = raw_answer(
        post(client, raw_pictures(png_of(0), parameters=RAW_OUTPUTS, outputs=wanted))
    )
    wanted = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "scores"}]
    other, label = raw_answer(post(client, raw_pictures(png_of(0), outputs=wanted)))

    assert [list(output)[-1] for output in header["outputs"]] == ["data", "parameters"]
    assert len(raw) == 12
    assert [list(output)[-1] for output in other["outputs"]] == ["parameters", "data"]
    assert label == framed(*(text.encode() for text in header["outputs"][0]["data"]))


def test_classes_may_be_raw(client: HttpClient) -> None:
    """Framed texts."""
    wanted = [{"name": "scores", "parameters": {"classification": 3, "binary_data": True}}]
    header, raw = raw_answer(post(client, raw_pictures(png_of(0), outputs=wanted)))
    order = np.argsort(-scores_of(0))

    assert header["outputs"][0]["shape"] == [1, 3]
    texts = [raw[start:].split(b":") for start in _starts(raw)]
    assert [int(text[1]) for text in texts] == order.tolist()


def _starts(raw: bytes) -> Iterator[int]:
    """Where the elements of framed texts begin."""
    place = 0
    while place < len(raw):
        (length,) = struct.unpack_from("<I", raw, place)
        yield place + 4
        place += 4 + length


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_picture_alone_is_a_request(client: HttpClient, form: str) -> None:
    """`curl --data-binary @cat.jpg -H 'Inference-Header-Content-Length: 0'`: one row, all raw."""
    data = encoded(plain((30, 17)), form)
    response = client.post(INFER, content=data, headers={LENGTH: "0"})
    header, raw = raw_answer(response)
    direct = client.post("/predict/colours", content=data).json()

    assert header["model_name"] == "colours"
    assert [output["shape"] for output in header["outputs"]] == [[1, 3], [1]]
    assert [*struct.unpack_from("<3f", raw)] == [*direct["scores"].values()]
    assert raw[12:] == framed(direct["label"].encode())


def test_an_array_alone_is_a_request(client: HttpClient) -> None:
    """Of the one shape that its model takes for one row."""
    features = struct.pack("<3f", *features_of(0).tolist())
    sent = {"pixels": some_picture(0).tobytes(), "features": features}
    for kind, body in sent.items():
        path = f"/v2/models/colours.{kind}/infer"
        _, raw = raw_answer(client.post(path, content=body, headers={LENGTH: "0"}))
        np.testing.assert_allclose(struct.unpack_from("<3f", raw), scores_of(0), atol=1e-5)
        wrong = client.post(path, content=body + b"x", headers={LENGTH: "0"})
        assert "takes" in error(wrong, 400)


@pytest.mark.parametrize("length", ["-1", "x", "1.5", "", "99999999", "9" * 5000, "٣", "+3"])
def test_a_length_that_the_body_cannot_have_is_refused(client: HttpClient, length: str) -> None:
    """Negative, no number, or more than there is."""
    body, _ = raw_pictures(png_of(0))
    headers: Any = {LENGTH: length.encode()}
    detail = error(client.post(INFER, content=body, headers=headers), 400)
    assert "expected a whole number of bytes" in detail


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_length_that_lies_is_refused(client: HttpClient, shift: int) -> None:
    """The JSON ends too early, or goes on into the tensor."""
    body, headers = raw_pictures(png_of(0))
    headers[LENGTH] = str(int(headers[LENGTH]) + shift)

    assert "not JSON" in error(post(client, (body, headers)), 400)


def test_bytes_that_are_missing_or_left_over_are_refused(client: HttpClient) -> None:
    """Whether the header announces them or not."""
    body, headers = raw_pictures(png_of(0))

    assert "bytes follow the JSON" in error(post(client, (body[:-1], headers)), 400)
    assert "bytes follow the JSON" in error(post(client, (body + b"x", headers)), 400)
    spare = json.dumps(image(png_of(0))).encode()
    left = client.post(INFER, content=spare + b"more", headers={LENGTH: str(len(spare))})
    assert "4 bytes follow the JSON of the request; expected 0" in error(left, 400)


FRAMES = {
    "fewer": (framed(b"a"), [2], "1 elements"),
    "more": (framed(b"a", b"b"), [1], "5 bytes more"),
    "a length that lies": (b"\xff\xff\xff\xffabc", [1], "4294967295 bytes by its length"),
    "half a length": (framed(b"a") + b"\x01\x00", [2], "ends within its length"),
    "nothing": (b"", [1], "0 elements"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_malformed_frames_are_refused(client: HttpClient, kind: str) -> None:
    """With the element that is wrong."""
    raw, shape, reason = FRAMES[kind]
    response = post(client, raw_request("image", "BYTES", shape, raw))

    assert reason in error(response, 400)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("encoding", COMPRESS)
@pytest.mark.parametrize("is_raw", [True, False])
def test_a_request_may_be_compressed(client: HttpClient, encoding: str, *, is_raw: bool) -> None:
    """The whole body; the header's length stays that of the JSON before it was compressed."""
    body, headers = raw_pictures(png_of(0))
    if not is_raw:
        body = json.dumps(image(png_of(0))).encode()
        headers[LENGTH] = str(len(body))
    alone = client.post(INFER, content=body, headers=headers)
    response = client.post(
        INFER, content=COMPRESS[encoding](body), headers={**headers, "content-encoding": encoding}
    )

    assert response.json() == alone.json()


@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_request_that_opens_to_too_much_is_refused(client: HttpClient, encoding: str) -> None:
    """A bomb is too large, whatever it would say."""
    body = COMPRESS[encoding](bytes(10 * MAX_BODY))
    response = client.post(INFER, content=body, headers={"content-encoding": encoding})

    assert f"more than {MAX_BODY} bytes once it is opened" in error(response, 413)


def test_a_request_in_another_encoding_is_refused(client: HttpClient) -> None:
    """415, with those that are accepted; `identity` is none."""
    body = json.dumps(image(png_of(0))).encode()
    other = client.post(INFER, content=body, headers={"content-encoding": "br"})
    cut = client.post(INFER, content=gzip.compress(body)[:-9], headers={"content-encoding": "gzip"})
    none = client.post(INFER, content=body, headers={"content-encoding": "identity"})

    assert "expected gzip or deflate" in error(other, 415)
    assert "ends before its gzip does" in error(cut, 400)
    assert none.status_code == 200


@pytest.mark.parametrize("encoding", COMPRESS)
def test_an_answer_is_compressed_if_that_is_asked_for(client: HttpClient, encoding: str) -> None:
    """The whole body; the header's length stays that of the JSON."""
    body, headers = raw_pictures(png_of(0), parameters=RAW_OUTPUTS)
    asked = client.post(INFER, content=body, headers={**headers, "accept-encoding": encoding})
    alone = client.post(INFER, content=body, headers={**headers, "accept-encoding": "identity"})

    assert asked.headers["content-encoding"] == encoding
    assert "content-encoding" not in alone.headers
    assert asked.headers["vary"] == "accept-encoding"
    # httpx has opened it.
    assert raw_answer(asked) == raw_answer(alone)


@pytest.mark.parametrize(
    "path", ["/v2", "/v2/health/live", "/v2/models/colours", "/v2/models/colours/config"]
)
def test_nothing_else_is_compressed(client: HttpClient, path: str) -> None:
    """The standard asynchronous client says that it takes gzip, and reads it as it is."""
    response = client.get(path, headers={"accept-encoding": "gzip, deflate, br"})

    assert response.status_code == 200
    assert "content-encoding" not in response.headers


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("gzip, deflate, br", "gzip"),
        ("br;q=1.0, deflate;q=0.5", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("GZIP", "gzip"),
        ("gzip;q=0.000", None),
        ("identity, *", None),
        ("", None),
    ],
)
def test_an_encoding_that_is_refused_is_not_used(header: str, encoding: str | None) -> None:
    """RFC 9110, section 12.5.3: a weight of 0 means not acceptable."""
    assert accepted_encoding(header) == encoding


def test_labels_are_those_of_the_head(client: HttpClient) -> None:
    """The three that its manifest lists."""
    header, raw = raw_answer(client.post(INFER, content=png_of(0), headers={LENGTH: "0"}))

    assert header["outputs"][1]["name"] == "label"
    assert raw[16:].decode() in LABELS
