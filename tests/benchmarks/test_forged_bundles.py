"""The proof that forged bundles are refused, in short; and that it can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from benchmarks import forged_bundles
from benchmarks.forged_bundles import KINDS, Court, Tally, forge
from benchmarks.forgery import TASK, Kind, Stock, flipped, kind, repacked
from benchmarks.random_trunk import linear_bundle, write_trunk
from export import bundle as bundle_module
from export import sign as sign_module
from export.bundle import GOLDEN, HEAD, Bundle, read_trunk_folder
from export.sign import Claim, Envelope, verify
from serve import contender, gates, graph_gate, proposal, signature_gate
from serve.engine import Engine
from serve.gates import GateError
from serve.messages import Change
from serve.trust import KeyChange

Patch = Callable[[pytest.MonkeyPatch], object]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trunk of random features."""
    folder = tmp_path_factory.mktemp("forged") / "trunk"
    write_trunk(folder)
    return folder


@pytest.fixture(scope="module")
def engine(trunk: Path) -> Engine:
    """The trunk, loaded."""
    manifest, files = read_trunk_folder(trunk)
    return Engine(files["trunk.onnx"], manifest)


@pytest.fixture(scope="module")
def court(tmp_path_factory: pytest.TempPathFactory, trunk: Path, engine: Engine) -> Iterator[Court]:
    """A service with one live version, before which forgeries are brought."""
    chance = np.random.default_rng(0)
    stock = [linear_bundle(engine, TASK, chance) for _ in range(5)]
    court = Court(tmp_path_factory.mktemp("court"), trunk, stock)
    yield court
    court.close()


def failures(tally: Tally) -> list[str]:
    """What the proof would fail for."""
    return [*tally.admitted, *tally.misjudged, *tally.loaded]


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_forgeries_of_every_kind_are_refused_where_and_why_they_should(
    court: Court, name: str
) -> None:
    """Three of each, and nothing is loaded where the defect shows before."""
    (kind,) = [kind for kind in KINDS if kind.name == name]
    tally = forge(court, 3, np.random.default_rng(len(name)), [kind])

    assert failures(tally) == []
    assert tally.refused[name] == 3


def test_good_bundles_are_admitted(court: Court, engine: Engine) -> None:
    """Ten of the task, and ten of others."""
    chance = np.random.default_rng(1)
    for place in range(20):
        task = TASK if place % 2 else f"task{place}"
        bundle = linear_bundle(engine, task, chance)
        fate = court.judge(court.stock.signed(bundle, task=task).to_zip(), task)

        assert (fate.gate, fate.reason, fate.num_loads) == ("", "", 1)


def test_a_flip_that_changes_nothing_is_told_apart(court: Court) -> None:
    """In a member's time, which nobody reads: the bundle is the same to the byte."""
    data = bytearray(court.stock.signed(court.stock.bundles[0]).to_zip())
    data[data.index(b"PK\x01\x02") + 12] ^= 1

    assert court.judge(bytes(data)).gate == "same"


class Everything(str):
    """Equal to every text."""

    __slots__ = ()

    @override
    def __ne__(self, other: object) -> bool:
        return False

    @override
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = str.__hash__


class GullibleKey:
    """Takes everything for its own signature."""

    @classmethod
    def from_public_bytes(cls, _: bytes) -> GullibleKey:
        """Whatever the key."""
        return cls()

    def verify(self, signature: bytes, data: bytes) -> None:
        """Says nothing."""


def any_claim(**claims: Any) -> Patch:
    """A statement's claims are not compared."""

    def patched(envelope: Envelope, public_key: bytes) -> Claim:
        return replace(verify(envelope, public_key), **claims)

    return lambda patch: patch.setattr(signature_gate, "verify", patched)


def replaced(module: object, name: str, value: object) -> Patch:
    """A protection is replaced by something that protects from nothing."""
    return lambda patch: patch.setattr(module, name, value)


def says(answer: object) -> Callable[..., object]:
    """A function that always answers so."""

    def say(*_: object, **__: object) -> object:
        return answer

    return say


def trusts_all(patch: pytest.MonkeyPatch) -> None:
    """Any key that is known may sign, at the gate and in the conductor."""

    def trust(keys: Mapping[str, KeyChange], key_id: str, **_: object) -> KeyChange:
        return keys[key_id]

    for module in (signature_gate, proposal):
        patch.setattr(module, "trusted_key", trust)


def loads_anything(patch: pytest.MonkeyPatch) -> None:
    """No bound of costs; what would fill the memory is not really loaded here."""

    def load_head(bundle: Bundle, *_: object) -> object:
        raise GateError(f"{bundle.digest} would be loaded now")

    patch.setattr(graph_gate, "check_costs", says(None))
    patch.setattr(contender, "load_head", load_head)


# What protects, how it is switched off, and the kinds that then go through or are found out late.
CONTROLS: dict[str, tuple[Patch, str]] = {
    "digests of files": (replaced(bundle_module, "check_files", says(None)), "bit flip in card.md"),
    "files belong together": (
        replaced(bundle_module, "check_files", says(None)),
        "samples of another bundle",
    ),
    "members of a zip": (replaced(bundle_module, "_check_member", says(None)), "symbolic link"),
    "names in a zip": (replaced(bundle_module, "_check_member", says(None)), "path outside"),
    "packing": (replaced(bundle_module, "_check_member", says(None)), "packed by LZMA"),
    "number of members": (
        replaced(bundle_module, "MAX_ZIP_MEMBERS", 10**6),
        "zip bomb of many members",
    ),
    "size of a bundle": (
        replaced(bundle_module, "MAX_BUNDLE_BYTES", 2**30),
        "zip bomb of zeros",
    ),
    "size of a signature": (
        replaced(bundle_module, "MAX_SIGNATURE_BYTES", 2**30),
        "endless signature.json",
    ),
    "verification, impostor": (
        replaced(sign_module, "Ed25519PublicKey", GullibleKey),
        "impostor",
    ),
    "verification, random": (
        replaced(sign_module, "Ed25519PublicKey", GullibleKey),
        "random signature",
    ),
    "claim of a bundle": (any_claim(bundle=Everything()), "signature of another bundle"),
    "claim of repacked files": (
        any_claim(bundle=Everything()),
        "head and manifest of the forger's",
    ),
    "claim of a task": (any_claim(task=Everything()), "signature for another task"),
    "clocks": (
        replaced(signature_gate, "MAX_AHEAD", timedelta(days=10**6)),
        "signed in the future",
    ),
    "revocation": (trusts_all, "revoked key"),
    "expiry": (trusts_all, "expired key"),
    "keys for some tasks": (trusts_all, "key for other tasks"),
    "replay": (replaced(proposal, "_replay_refusal", says(None)), "replay"),
    "trunk": (replaced(gates, "check_trunk", says("")), "another trunk"),
    "preprocessing": (replaced(gates, "check_trunk", says("")), "another preprocessing"),
    "operators": (replaced(graph_gate, "_check_nodes", says(None)), "control flow"),
    "domains": (replaced(graph_gate, "_check_nodes", says(None)), "foreign operators"),
    "functions": (replaced(graph_gate, "_check_nodes", says(None)), "function of its own"),
    "number of nodes": (replaced(graph_gate, "_check_nodes", says(None)), "too many nodes"),
    "finite weights": (replaced(graph_gate, "_check_weights", says(None)), "NaN or infinity"),
    "weights in the file": (
        replaced(graph_gate, "_check_weights", says(None)),
        "weight in another file",
    ),
    "number of parts": (
        replaced(graph_gate, "count_parts", says(0)),
        "weights by the ten thousand",
    ),
    "interface": (replaced(graph_gate, "_check_interface", says(None)), "another interface"),
    "costs": (loads_anything, "tensor that fills the memory"),
    "golden samples": (replaced(gates, "check_golden", says("")), "other weights"),
    "labels": (
        replaced(forged_bundles, "Change", partial(Change, allow_new_labels=True)),
        "other labels",
    ),
}


@pytest.mark.parametrize("protection", CONTROLS)
def test_the_proof_fails_without_each_protection(
    court: Court, monkeypatch: pytest.MonkeyPatch, protection: str
) -> None:
    """Forgeries go through, or are found out elsewhere, for another reason, or too late."""
    switch_off, name = CONTROLS[protection]
    kinds = [kind for kind in KINDS if kind.name == name]
    switch_off(monkeypatch)
    tally = forge(court, 3, np.random.default_rng(0), kinds)

    assert len(kinds) == 1
    assert failures(tally) != []


def test_what_a_trusted_key_signs_never_makes_the_gates_fail(court: Court) -> None:
    """Graphs and samples with flipped bits are admitted or refused, and never an error."""
    chance = np.random.default_rng(0)
    outcomes = set()
    for place in range(300):
        good = court.stock.some(chance)
        name = HEAD if place % 4 else GOLDEN
        # Most bytes are weights; what is interesting stands at both ends.
        data, size = good.files[name], 200
        ends = flipped(data[:size] + data[-size:], chance)
        forged = repacked(good, {name: ends[:size] + data[size:-size] + ends[size:]})
        outcomes.add(court.judge(court.stock.signed(forged).to_zip()).gate)

    assert outcomes >= {"", "graph", "golden"}


def test_a_kind_that_is_refused_elsewhere_is_not_counted_as_refused_rightly(court: Court) -> None:
    """The proof is of the reason too."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        return stock.some(chance).to_zip()

    wrong: list[Kind] = [
        kind("a", "bundle", "is not signed", make),
        kind("b", "signature", "because it rains", make),
    ]
    tally = forge(court, 2, np.random.default_rng(0), wrong)

    assert len(tally.misjudged) == 2
