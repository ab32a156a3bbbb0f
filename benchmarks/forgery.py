"""What forgeries of bundles are made of: what the forger has, and what has to become of them."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import MANIFEST, SIGNATURE, Bundle, entry_of
from export.sign import sign

TASK, OTHER_TASK = "photos", "others"


@dataclass(frozen=True)
class Stock:
    """What a forger has at hand: good bundles, and keys of every kind.

    Args:
        bundles: Of one task, not signed.
        keys: By what the service thinks of them: "trusted", "expired", "revoked", "unknown", and
            "elsewhere", which is trusted for another task.
        now: When it is signed.
        last_signed_at: When the task's live version was signed.
    """

    bundles: Sequence[Bundle]
    keys: Mapping[str, Ed25519PrivateKey]
    now: datetime
    last_signed_at: datetime

    def some(self, chance: np.random.Generator) -> Bundle:
        """A good bundle, not signed."""
        return self.bundles[int(chance.integers(len(self.bundles)))]

    def two(self, chance: np.random.Generator) -> tuple[Bundle, Bundle]:
        """Two different ones."""
        one, other = chance.choice(len(self.bundles), 2, replace=False)
        return self.bundles[int(one)], self.bundles[int(other)]

    def signed(
        self,
        bundle: Bundle,
        *,
        by: str = "trusted",
        task: str = TASK,
        signed_at: datetime | None = None,
    ) -> Bundle:
        """The bundle, signed for the task as of now unless told otherwise."""
        return sign(bundle, self.keys[by], task=task, signed_at=signed_at or self.now)


Make = Callable[[np.random.Generator, Stock], bytes]


@dataclass(frozen=True)
class Kind:
    """A way to forge a bundle, and where it has to be found out.

    Args:
        gates: Where it may be refused: in most cases one place; several where chance decides what
            of the bundle is hit.
        reason: A regular expression that is found in the reason, whatever the place.
        is_loaded: Whether a head has to be loaded to find it out.
        may_be_harmless: Whether chance may hit what nobody reads, so that the bundle is the same.
    """

    name: str
    gates: frozenset[str]
    reason: str
    make: Make
    is_loaded: bool = False
    may_be_harmless: bool = False


def kind(
    name: str,
    gates: str,
    reason: str,
    make: Make,
    *,
    is_loaded: bool = False,
    may_be_harmless: bool = False,
) -> Kind:
    """A kind whose gates are named in one string."""
    return Kind(name, frozenset(gates.split()), reason, make, is_loaded, may_be_harmless)


def files_of(bundle: Bundle) -> dict[str, bytes]:
    """Every file of a bundle by its name."""
    signature = {} if bundle.signature is None else {SIGNATURE: bundle.signature}
    return {MANIFEST: bundle.manifest_bytes, **bundle.files, **signature}


def zipped(
    members: Mapping[str, bytes] | Sequence[tuple[str | zipfile.ZipInfo, bytes]],
    method: int = zipfile.ZIP_DEFLATED,
) -> bytes:
    """A zip of any members, also of such as no bundle has."""
    pairs = list(members.items()) if isinstance(members, Mapping) else members
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name", category=UserWarning)
        for name, data in pairs:
            archive.writestr(name, data)
    return buffer.getvalue()


def repacked(bundle: Bundle, files: Mapping[str, bytes] | None = None, **fields: object) -> Bundle:
    """A bundle with other files or fields, whose manifest agrees with them; not signed."""
    changed = {**bundle.files, **(files or {})}
    manifest = json.loads(bundle.manifest_bytes)
    manifest["files"] = {name: entry_of(data).model_dump() for name, data in changed.items()}
    data = json.dumps({**manifest, **fields}, indent=2).encode()
    return replace(Bundle.of_files({MANIFEST: data, **changed}), signature=None)


def flipped(data: bytes, chance: np.random.Generator) -> bytes:
    """The same bytes but for one bit."""
    place = int(chance.integers(8 * len(data)))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def cut(data: bytes, chance: np.random.Generator) -> bytes:
    """Without some bytes at the end, at least one."""
    return data[: int(chance.integers(len(data)))]


def soon(now: datetime, *, minutes: float) -> datetime:
    """So many minutes later."""
    return now + timedelta(minutes=minutes)
