"""Requests that no honest caller sends: damaged pictures, bodies, archives, headers and frames."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from benchmarks.channel_means import png_of, some_picture

BOUNDARY = "7MA4YWxkTrZu0gW"


@dataclass(frozen=True)
class Sent:
    """One request."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Frame:
    """Bytes for the socket; too many to be shown."""

    data: bytes = field(repr=False)


def _pictures() -> list[bytes]:
    """One of each kind, small."""
    picture = Image.fromarray(some_picture(0))
    files = [png_of(some_picture(0))]
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("PNG", {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("WEBP", {"save_all": True, "append_images": [picture.rotate(90)]}),
    ]
    for form, options in kinds:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        files.append(buffer.getvalue())
    for mode in ("L", "1", "P", "LA", "RGBA", "I;16"):
        buffer = io.BytesIO()
        picture.convert(mode if mode != "I;16" else "I").convert(mode).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("manifest.json", json.dumps({"schema_version": 1, "task": "pets"}))
        archive.writestr("head.onnx", b"\x08\x0a\x12\x00")
    return buffer.getvalue()


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes with a few of them changed, cut out, doubled, or the end missing."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 100]))
        match draw(st.sampled_from(["change", "cut", "double", "end"])):
            case "change":
                data[place : place + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del data[place : place + length]
            case "double":
                data[place:place] = data[place : place + length]
            case _:
                del data[place:]
    return bytes(data)


PICTURES = damaged(st.sampled_from(_pictures()))
NUMBERS = st.sampled_from(
    ["0", "-1", "1", "3", "1e9", "9" * 30, "nan", "٣", "", " 1", "1.5", "0x1", "true", "\x00"]
)
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["pets", "*", "..", "%2e%2e", "a" * 300]))
JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
# As latin-1, which is how headers travel; what would end a header is for the frames below.
HEADER_VALUES = st.text(
    st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f\xa0"), max_size=40
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "content-type",
            "content-encoding",
            "accept",
            "x-headstock-timeout-ms",
            "x-headstock-caller",
            "idempotency-key",
            "x-request-id",
            "authorization",
            "inference-header-content-length",
            "range",
            "expect",
        ]
    ),
    st.one_of(
        HEADER_VALUES,
        NUMBERS.filter(lambda text: text.isascii() and text.isprintable() and " " not in text),
        st.sampled_from(
            [
                "application/json",
                "multipart/form-data",
                f"multipart/form-data; boundary={BOUNDARY}",
                "multipart/form-data; boundary=",
                "image/png",
                "application/zip",
                "gzip",
                "Bearer x",
                "application/json; charset=utf-16",
            ]
        ),
    ),
    max_size=3,
)


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))


@st.composite
def queries(draw: st.DrawFn, *names: str) -> str:
    """Parameters of these names and others, good and bad values, some twice."""
    chosen = draw(st.lists(st.sampled_from([*names, "more"]), max_size=3))
    pairs = [f"{name}={_quoted(draw(st.one_of(NUMBERS, TEXTS)))}" for name in chosen]
    return f"?{'&'.join(pairs)}" if pairs else ""


@st.composite
def forms(draw: st.DrawFn) -> bytes:
    """Multipart bodies, mostly almost right."""
    parts = b""
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(["image", "images", "", "a" * 200]))
        file = draw(st.sampled_from([b"", b'; filename="a.png"', b"; filename*=utf-8''%00"]))
        parts += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        parts += file + b"\r\n\r\n" + draw(PICTURES) + b"\r\n"
    return draw(damaged(st.just(parts + f"--{BOUNDARY}--\r\n".encode())))


@st.composite
def predictions(draw: st.DrawFn) -> Sent:
    """Predictions whose picture, body, question or headers are not what they should be."""
    form = draw(st.sampled_from(["raw", "raw", "multipart", "json", "anything"]))
    headers = dict(draw(HEADERS)) if draw(st.booleans()) else {}
    match form:
        case "raw":
            body = draw(PICTURES)
        case "multipart":
            headers = {**headers, "content-type": f"multipart/form-data; boundary={BOUNDARY}"}
            body = draw(forms())
        case "json":
            headers = {**headers, "content-type": "application/json"}
            picture = base64.b64encode(draw(PICTURES)).decode()
            value = draw(st.one_of(JSONS, st.just({"image": picture}), st.just(picture)))
            body = draw(damaged(st.just(json.dumps(value).encode())))
        case _:
            body = draw(st.binary(max_size=500))
    one = f"/predict/{_quoted(draw(TEXTS))}{draw(queries('top', 'tasks'))}"
    live = f"/predict/pets{draw(queries('top'))}"
    several = f"/predict{draw(queries('top', 'tasks'))}"
    path = draw(st.sampled_from([live, live, f"/predict?tasks=pets,colours&{several[9:]}", one]))
    return Sent("POST", path, headers, body)


@st.composite
def changes(draw: st.DrawFn) -> Sent:
    """Pushes of damaged archives and samples, and commands of wrong fields."""
    task = draw(st.sampled_from(["pets", "colours", "none"]))
    method, path = draw(
        st.sampled_from(
            [
                ("POST", f"/tasks/{task}/versions"),
                ("PUT", f"/tasks/{task}/heldout"),
                ("POST", f"/tasks/{task}/promote"),
                ("POST", f"/tasks/{task}/rollback"),
                ("PATCH", f"/tasks/{task}"),
                ("POST", "/keys"),
                ("POST", "/versions"),
            ]
        )
    )
    names = ("canary", "shadow", "dry_run", "message", "new_labels", "expected")
    fields = st.dictionaries(
        st.sampled_from(["to", "expected", "message", "share", "weight", "tasks", "public_key"]),
        JSONS,
        max_size=3,
    )
    body = draw(
        st.one_of(
            damaged(st.just(_zip())), st.binary(max_size=200), fields.map(_json), JSONS.map(_json)
        )
    )
    return Sent(method, path + draw(queries(*names)), dict(draw(HEADERS)), body)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def inferences(draw: st.DrawFn) -> Sent:
    """Inference requests whose shapes, types, lengths or raw tensors do not agree."""
    model = draw(st.sampled_from(["pets", "pets.pixels", "pets.features", "colours", "none"]))
    place = draw(st.sampled_from(["", "/versions/1", "/versions/9", "/versions/x"]))
    name = draw(st.sampled_from(["image", "pixels", "features", "more"]))
    raw = draw(st.one_of(PICTURES.map(_counted), st.binary(max_size=200), FLOATS))
    tensor: dict[str, Any] = {
        "name": name,
        "shape": draw(st.one_of(SHAPES, JSONS)),
        "datatype": draw(st.sampled_from(["BYTES", "UINT8", "FP32", "FP64", "BOOL", "", None])),
    }
    if draw(st.booleans()):
        tensor["parameters"] = {"binary_data_size": draw(st.sampled_from([len(raw), 0, -1, 2**40]))}
    else:
        tensor["data"] = draw(st.one_of(JSONS, st.lists(st.floats(), max_size=12)))
    asked: dict[str, Any] = {"inputs": [tensor] * draw(st.sampled_from([1, 1, 1, 0, 2]))}
    if draw(st.booleans()):
        asked["outputs"] = [{"name": "scores", "parameters": draw(JSONS)}]
    if draw(st.booleans()):
        asked["parameters"] = draw(st.one_of(JSONS, st.just({"binary_data_output": True})))
    head = draw(damaged(st.just(_json(asked))))
    length = draw(st.sampled_from([len(head), len(head), 0, -1, len(head) + 1, 10**12]))
    headers = dict(draw(HEADERS)) | {"inference-header-content-length": str(length)}
    return Sent("POST", f"/v2/models/{model}{place}/infer", headers, head + raw)


def _counted(data: bytes) -> bytes:
    """One element of a raw BYTES tensor."""
    return struct.pack("<I", len(data)) + data


SHAPES = st.sampled_from(
    [[1], [1, 3], [2, 3], [1, 32, 32, 3], [-1], [0], [2**40, 2**40], [1, 3, 1], [], [10**9]]
)
FLOATS = st.lists(st.floats(width=32), min_size=3, max_size=6).map(
    lambda values: struct.pack(f"<{len(values)}f", *values)
)
READS = (
    "/tasks",
    "/tasks/{}",
    "/tasks/{}/versions",
    "/tasks/{}/card",
    "/tasks/{}/diff",
    "/bundles/{}",
    "/keys",
    "/log",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/{}",
    "/v2/{}",
    "/v2/models/{}",
)


@st.composite
def reads(draw: st.DrawFn) -> Sent:
    """Reading with names and numbers that are none."""
    path = draw(st.sampled_from(READS)).format(_quoted(draw(TEXTS)))
    method = draw(st.sampled_from(["GET", "GET", "GET", "HEAD", "OPTIONS", "TRACE", "PUT"]))
    return Sent(method, path + draw(queries("a", "b", "after")), dict(draw(HEADERS)))


@st.composite
def frames(draw: st.DrawFn) -> Frame:
    """Bytes for the socket: HTTP/1.1 whose lines, lengths and chunks are wrong."""
    body = draw(st.one_of(PICTURES, st.binary(max_size=100)))
    length = draw(st.sampled_from([str(len(body)), "0", "-1", "99999999999", "x", "1, 2", ""]))
    lines = [
        draw(
            st.sampled_from(
                [
                    "POST /predict/pets HTTP/1.1",
                    "POST /predict/pets HTTP/1.0",
                    "POST http://elsewhere/predict/pets HTTP/1.1",
                    "POST * HTTP/1.1",
                    "GET /tasks HTTP/9.9",
                    "GET /tasks",
                    "\x00\x01",
                    f"GET /{'a' * 70_000} HTTP/1.1",
                ]
            )
        ),
        "Host: 127.0.0.1",
        draw(
            st.sampled_from(
                [
                    f"Content-Length: {length}",
                    "Transfer-Encoding: chunked",
                    f"Content-Length: {length}\r\nTransfer-Encoding: chunked",
                    "Transfer-Encoding: gzip, chunked",
                    "Upgrade: websocket\r\nConnection: Upgrade",
                    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
                    "X: " + "a" * 70_000,
                    "\r\n".join(f"X-{number}: 1" for number in range(2000)),
                    "Expect: 100-continue",
                    "No colon",
                ]
            )
        ),
    ]
    if draw(st.booleans()):
        body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    whole = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
    return Frame(draw(damaged(st.just(whole))))
