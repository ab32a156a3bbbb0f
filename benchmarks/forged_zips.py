"""Bundles that were damaged or tampered with on their way; nobody had a key to sign them anew."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from benchmarks.forgery import Kind, Make, Stock, cut, files_of, flipped, kind, repacked, zipped
from export.bundle import CARD, GOLDEN, HEAD, MANIFEST, MAX_BUNDLE_BYTES, SIGNATURE

Change = Callable[[dict[str, bytes], np.random.Generator, Stock], object]
NAMES = (MANIFEST, HEAD, GOLDEN, CARD)
DEFLATE64 = 9


def _zip(change: Callable[[bytes, np.random.Generator], bytes]) -> Make:
    """Forge the bytes of a good zip."""
    return lambda chance, stock: change(stock.signed(stock.some(chance)).to_zip(), chance)


def _files(change: Change) -> Make:
    """Forge the files of a good bundle, in a zip that is whole."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        files = files_of(stock.signed(stock.some(chance)))
        change(files, chance, stock)
        return zipped(files)

    return make


def _members(
    change: Callable[[list[tuple[str | zipfile.ZipInfo, bytes]]], object],
) -> Make:
    """Forge the list of a zip's members."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        members: list[tuple[str | zipfile.ZipInfo, bytes]] = list(
            files_of(stock.signed(stock.some(chance))).items()
        )
        change(members)
        return zipped(members)

    return make


def _flip(name: str) -> Change:
    return lambda files, chance, _: files.update({name: flipped(files[name], chance)})


def _cut(files: dict[str, bytes], chance: np.random.Generator, _: Stock) -> None:
    name = str(chance.choice(NAMES))
    files[name] = cut(files[name], chance)


def _drop(files: dict[str, bytes], chance: np.random.Generator, _: Stock) -> None:
    del files[str(chance.choice(NAMES))]


def _swap(name: str) -> Change:
    """A file of another bundle that is good too."""

    def swap(files: dict[str, bytes], chance: np.random.Generator, stock: Stock) -> None:
        others = [files_of(bundle) for bundle in stock.bundles]
        different = [other[name] for other in others if other[name] != files[name]]
        files[name] = different[int(chance.integers(len(different)))]

    return swap


def _repack(chance: np.random.Generator, stock: Stock) -> bytes:
    """Another head under a manifest that agrees with it, and the old signature."""
    bundle, other = stock.two(chance)
    signature = stock.signed(bundle).signature
    assert signature is not None
    return zipped({**files_of(repacked(bundle, {HEAD: other.files[HEAD]})), SIGNATURE: signature})


def _escape(files: dict[str, bytes], chance: np.random.Generator, _: Stock) -> None:
    files[str(chance.choice(["../head.onnx", "/etc/cron.d/x", "a/b", "..\\x", ".."]))] = b"x"


def _rename(files: dict[str, bytes], chance: np.random.Generator, _: Stock) -> None:
    files[str(chance.choice(["../", "./", "/root/", "..\\"])) + HEAD] = files.pop(HEAD)


def _link(members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> None:
    """A symbolic link in place of the head."""
    link = zipfile.ZipInfo(HEAD)
    link.create_system, link.external_attr = 3, 0o120777 << 16
    members[:] = [member for member in members if member[0] != HEAD]
    members.append((link, b"/etc/passwd"))


def _twice(members: list[tuple[str | zipfile.ZipInfo, bytes]]) -> None:
    members.append((MANIFEST, b"{}"))


def _crowd(chance: np.random.Generator, stock: Stock) -> bytes:
    """Many small members."""
    files = files_of(stock.signed(stock.some(chance)))
    return zipped({**files, **{f"x{n}": b"" for n in range(int(chance.integers(65, 2000)))}})


@cache
def _zeros() -> bytes:
    """A zip of 70 kB that inflates to more than a bundle may have."""
    return zipped({MANIFEST: bytes(MAX_BUNDLE_BYTES + 1)})


def _bomb(chance: np.random.Generator, _: Stock) -> bytes:
    """With some harmless bytes before it, so that no two are the same."""
    return bytes(int(chance.integers(1, 64))) + _zeros()


def _liar(size: int) -> Make:
    """A bomb, or a member, whose headers claim another size than it has."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        is_bomb = size < MAX_BUNDLE_BYTES and chance.random() < 0.02
        data = bytearray(_zeros() if is_bomb else stock.signed(stock.some(chance)).to_zip())
        with zipfile.ZipFile(io.BytesIO(bytes(data))) as archive:
            entry = archive.infolist()[int(chance.integers(len(archive.infolist())))]
        place = entry.header_offset
        data[place + 22 : place + 26] = struct.pack("<I", size)
        central = data.index(b"PK\x01\x02" + b"", archive.start_dir)
        while data[central + 42 : central + 46] != struct.pack("<I", place):
            central = data.index(b"PK\x01\x02", central + 4)
        data[central + 24 : central + 28] = struct.pack("<I", size)
        return bytes(data)

    return make


def _nested(files: dict[str, bytes], chance: np.random.Generator, stock: Stock) -> None:
    """A whole good zip where the head should be."""
    files[HEAD] = stock.signed(stock.some(chance)).to_zip()


def _encrypted(chance: np.random.Generator, stock: Stock) -> bytes:
    """Marked as encrypted, in both headers."""
    return _marked(stock.signed(stock.some(chance)).to_zip(), local=6, central=8, value=1)


def _packed(method: int) -> Make:
    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        if method == DEFLATE64:
            data = stock.signed(stock.some(chance)).to_zip()
            return _marked(data, local=8, central=10, value=method)
        return zipped(files_of(stock.signed(stock.some(chance))), method)

    return make


def _marked(data: bytes, *, local: int, central: int, value: int) -> bytes:
    """A zip with another value in a field of all its headers."""
    changed = bytearray(data)
    for magic, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        place = data.find(magic)
        while place >= 0:
            changed[place + offset : place + offset + 2] = struct.pack("<H", value)
            place = data.find(magic, place + 4)
    return bytes(changed)


def _noise(chance: np.random.Generator, _: Stock) -> bytes:
    """No zip at all."""
    return chance.bytes(int(chance.integers(1, 50_000)))


DAMAGED = r"is damaged: \d+ bytes do not have the size and sha256"
UNREADABLE = "zip file is damaged, or is none|has no manifest"
OUTSIDE = "a bundle's files lie at its top"
LISTED = "is not listed in the manifest"

KINDS: Sequence[Kind] = (
    kind("bit flip in the zip", "bundle signature", ".", _zip(flipped), may_be_harmless=True),
    kind("truncated zip", "bundle", UNREADABLE, _zip(cut)),
    kind("no zip", "bundle", UNREADABLE, _noise),
    kind("bit flip in manifest.json", "bundle signature", ".", _files(_flip(MANIFEST))),
    kind("bit flip in head.onnx", "bundle", f"{HEAD} {DAMAGED}", _files(_flip(HEAD))),
    kind("bit flip in golden.safetensors", "bundle", DAMAGED, _files(_flip(GOLDEN))),
    kind("bit flip in card.md", "bundle", f"{CARD} {DAMAGED}", _files(_flip(CARD))),
    kind("truncated file", "bundle", f"{DAMAGED}|manifest.json is invalid", _files(_cut)),
    kind("missing file", "bundle", "but missing|has no manifest.json", _files(_drop)),
    kind("head of another bundle", "bundle", DAMAGED, _files(_swap(HEAD))),
    kind("samples of another bundle", "bundle", DAMAGED, _files(_swap(GOLDEN))),
    kind("manifest of another bundle", "bundle", DAMAGED, _files(_swap(MANIFEST))),
    kind("head and manifest of the forger's", "signature", "is of another bundle", _repack),
    kind("path outside", "bundle", OUTSIDE, _files(_escape)),
    kind("head outside", "bundle", OUTSIDE, _files(_rename)),
    kind("file more", "bundle", LISTED, _files(lambda f, *_: f.update({"x.py": b"1"}))),
    kind("symbolic link", "bundle", "is not a plain file", _members(_link)),
    kind("member twice", "bundle", "holds manifest.json twice", _members(_twice)),
    kind("zip bomb of many members", "bundle", "lists more than 64 files", _crowd),
    kind("zip bomb of zeros", "bundle", "bundle is larger than", _bomb),
    kind("zip that claims less", "bundle", "damaged", _liar(3)),
    kind("zip that claims more", "bundle", "and the zip claims", _liar(2**32 - 2)),
    kind("zip in a zip", "bundle", f"{HEAD} {DAMAGED}", _files(_nested)),
    kind("encrypted member", "bundle", "encrypted", _encrypted),
    kind("packed by LZMA", "bundle", "in another way than deflate", _packed(zipfile.ZIP_LZMA)),
    kind("packed by bzip2", "bundle", "in another way than deflate", _packed(zipfile.ZIP_BZIP2)),
    kind("packed by Deflate64", "bundle", "in another way than deflate", _packed(DEFLATE64)),
)
