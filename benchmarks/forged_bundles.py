"""Is every forged bundle refused, at the right gate and before anything of it is loaded?

Ten thousand forgeries of seventy-odd kinds (damaged in transit, signed by nobody who may, signed
and hostile) and a thousand good bundles go the way of a push: the zip is read, the gates are asked,
the conductor's proposal is made. Each kind names the gate that has to refuse it and a part of the
reason.
"""

from __future__ import annotations

import base64
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import create_autospec, patch

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks import forged_graphs, forged_signatures, forged_zips
from benchmarks.forgery import OTHER_TASK, TASK, Kind, Stock
from benchmarks.random_trunk import linear_bundle, write_trunk
from benchmarks.report import Figure, arguments, finish, note, quantile_of
from export.bundle import HEAD, Bundle, BundleError, read_trunk_folder
from export.sign import key_id_of
from serve import contender
from serve.engine import Engine
from serve.headlog import HeadLog
from serve.heads import Head
from serve.link import Link, LinkError
from serve.messages import Change, Refused
from serve.onnx_session import Device
from serve.proposal import propose
from serve.record import LogView, Record, TaskChange, fold
from serve.replica import Replica
from serve.settings import ServeSettings
from serve.signature_gate import check_signature
from serve.trunks import store_trunk
from serve.trust import KeyChange

KINDS: Sequence[Kind] = (*forged_zips.KINDS, *forged_signatures.KINDS, *forged_graphs.KINDS)
NUM_FORGED, NUM_GOOD, NUM_STOCK = 10_000, 1_000, 20


@dataclass(frozen=True)
class Fate:
    """What became of a pushed zip.

    Args:
        gate: Which refused it; "" if it was admitted, "same" if it is a good bundle to the byte.
        num_loads: How many heads were loaded on the way.
    """

    gate: str
    reason: str
    num_loads: int


@dataclass
class Tally:
    """How the forgeries of all kinds fared."""

    refused: Counter[str] = field(default_factory=Counter)
    harmless: Counter[str] = field(default_factory=Counter)
    admitted: list[str] = field(default_factory=list)
    misjudged: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def add(self, kind: Kind, fate: Fate) -> bool:
        """Count one; False if it was no forgery."""
        if fate.gate == "same" and kind.may_be_harmless:
            self.harmless[kind.name] += 1
            return False
        if fate.gate in {"", "same"}:
            self.admitted.append(kind.name)
            return True
        self.refused[kind.name] += 1
        if fate.gate not in kind.gates or not re.search(kind.reason, fate.reason):
            self.misjudged.append(f"{kind.name}: {fate.gate}: {fate.reason}")
        if fate.num_loads and not kind.is_loaded:
            self.loaded.append(kind.name)
        return True


class Court:
    """A replica and a log before which pushes are brought, as the service does it.

    Args:
        bundles: Good ones, of which the last is live.
    """

    def __init__(self, folder: Path, trunk: Path, bundles: Sequence[Bundle]) -> None:
        keys = {name: Ed25519PrivateKey.generate() for name in _KEYS}
        now = datetime.now(UTC)
        self.stock = Stock(bundles[:-1], keys, now, last_signed_at=now - timedelta(hours=1))
        log = HeadLog(str(folder))
        live = self.stock.signed(bundles[-1], signed_at=self.stock.last_signed_at)
        self._begin(log, trunk, live)
        settings = ServeSettings.model_validate({"store": str(folder)})
        link = create_autospec(Link, instance=True)
        link.poll.side_effect = LinkError("there is no conductor: this replica only judges")
        self.replica = Replica("judge", log, link, settings)

    def close(self) -> None:
        """End the replica's threads."""
        self.replica.close()

    def judge(self, data: bytes, task: str = TASK) -> Fate:
        """The way of a push, up to the record."""
        with _counting_loads() as loads:
            gate, reason = self._push(data, task)
        return Fate(gate, reason, len(loads))

    def _push(self, data: bytes, task: str) -> tuple[str, str]:
        try:
            bundle = Bundle.of_zip(data)
        except BundleError as error:
            return "bundle", str(error)
        verdicts, signed = self.replica.admit(bundle, task, self.replica.engine)
        if not verdicts[-1].passed:
            return verdicts[-1].gate, verdicts[-1].reason
        change = Change(task, "new", bundle.digest, bundle.manifest.labels, signed=signed)
        outcome = propose(self.replica.history(), change, datetime.now(UTC))
        if isinstance(outcome, Refused):
            # What these two are called is their place in the documentation; neither is a gate.
            return ("replay" if outcome.kind == "conflict" else "labels"), outcome.reason
        is_same = any(self.stock.signed(good) == bundle for good in self.stock.bundles)
        return ("same" if is_same else ""), ""

    def _begin(self, log: HeadLog, trunk: Path, live: Bundle) -> None:
        manifest_bytes = (trunk / "trunk.json").read_bytes()
        change = store_trunk(log, manifest_bytes, read_trunk_folder(trunk)[1])
        keys = tuple(_trust(name, key, self.stock) for name, key in self.stock.keys.items())
        trusted = tuple(key for key in keys if key.name != "unknown")
        first = _record(LogView(), trunk=change, signing_keys=trusted)
        view = fold(LogView(), [log.put_record(first)])
        log.put_bundle(live)
        known = {key.key_id: key for key in trusted}
        push = TaskChange(
            task=TASK,
            version=1,
            action="push",
            bundle=live.digest,
            labels=live.manifest.labels,
            signed=check_signature(live, TASK, known, self.stock.now),
        )
        log.put_record(_record(view, changes=(push,)))


def main() -> None:
    """Push what is forged and what is good, and time what is verified."""
    chosen = arguments(__doc__ or "")
    num_forged, num_good = (1_000, 200) if chosen.quick else (NUM_FORGED, NUM_GOOD)
    with tempfile.TemporaryDirectory() as name:
        trunk = Path(name) / "trunk"
        write_trunk(trunk)
        manifest, files = read_trunk_folder(trunk)
        engine = Engine(files["trunk.onnx"], manifest)
        chance = np.random.default_rng(0)
        court = Court(
            Path(name) / "store",
            trunk,
            [linear_bundle(engine, TASK, chance) for _ in range(NUM_STOCK)],
        )
        tally = forge(court, num_forged, np.random.default_rng(1))
        admitted, verify_ms, cpu_ms, size_bytes = _push_good(court, engine, num_good)
        court.close()
    for problem in (*tally.admitted, *tally.misjudged, *tally.loaded):
        note(problem[:300])
    note(f"{len(KINDS)} kinds; harmless: {dict(tally.harmless)}")
    finish(
        "forged_bundles",
        [
            _exact("forged bundles refused", tally.refused.total() / num_forged, "", ">= 1"),
            _exact("forged bundles", num_forged, "", ""),
            _exact(
                "refused at another gate, or for another reason", len(tally.misjudged), "", "<= 0"
            ),
            _exact("loaded although it shows before loading", len(tally.loaded), "", "<= 0"),
            _exact("flips that change nothing: the same bundle", tally.harmless.total(), "", ""),
            _exact("good bundles admitted", admitted / num_good, "", ">= 1"),
            _exact("good bundles", num_good, "", ""),
            _exact("size of a head", size_bytes / 1000, "kB", ""),
            quantile_of("verification p50", verify_ms, 0.5, unit="ms", aim="<= 5"),
            quantile_of("verification p99", verify_ms, 0.99, unit="ms", aim="<= 5"),
            quantile_of("verification p99 on the processor", cpu_ms, 0.99, unit="ms"),
        ],
        chosen,
    )


def forge(
    court: Court, number: int, chance: np.random.Generator, kinds: Sequence[Kind] = KINDS
) -> Tally:
    """Bring so many forgeries before the court, of all kinds in turn.

    A flip that left the bundle as it was is none of them, and is tried again.
    """
    tally = Tally()
    for place in range(number):
        kind = kinds[place % len(kinds)]
        while not tally.add(kind, court.judge(kind.make(chance, court.stock))):
            pass
        if place % 1000 == 999:
            note(f"{place + 1} of {number} forgeries")
    return tally


def _push_good(
    court: Court, engine: Engine, number: int
) -> tuple[int, list[float], list[float], int]:
    """How many good bundles are admitted; and what unzipping, digests and signature take of each.

    Returns:
        Their number, milliseconds that passed, milliseconds of this thread on a processor, and the
        size of a head in bytes.
    """
    admitted, size_bytes = 0, 0
    verify_ms: list[float] = []
    cpu_ms: list[float] = []
    chance = np.random.default_rng(2)
    keys = court.replica.history().signing_keys
    for place in range(number):
        task = TASK if place % 2 else f"task{place}"
        bundle = linear_bundle(engine, task, chance)
        data = court.stock.signed(bundle, task=task).to_zip()
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        check_signature(Bundle.of_zip(data), task, keys, court.stock.now)
        verify_ms.append(1000 * (time.perf_counter() - began_s))
        cpu_ms.append(1000 * (time.thread_time() - began_cpu_s))
        fate = court.judge(data, task)
        admitted += not fate.gate
        size_bytes = len(bundle.files[HEAD])
        if fate.gate:
            note(f"refused: {fate.gate}: {fate.reason}")
        if place % 100 == 99:
            note(f"{place + 1} of {number} good bundles")
    return admitted, verify_ms, cpu_ms, size_bytes


_KEYS = ("trusted", "expired", "revoked", "unknown", "elsewhere")


def _trust(name: str, key: Ed25519PrivateKey, stock: Stock) -> KeyChange:
    raw = key.public_key().public_bytes_raw()
    return KeyChange(
        key_id=key_id_of(raw),
        public_key=base64.b64encode(raw).decode(),
        name=name,
        tasks=(f"{OTHER_TASK}*",) if name == "elsewhere" else ("*",),
        valid_until=stock.now - timedelta(days=1) if name == "expired" else None,
        is_revoked=name == "revoked",
    )


def _record(view: LogView, **fields: object) -> Record:
    first = {"number": view.number + 1, "kind": "commit", "previous": view.tip}
    about = {"writer": "benchmark", "written_at": "2026-01-01T00:00:00Z"}
    return Record.model_validate({**first, **about, **fields})


@contextmanager
def _counting_loads() -> Iterator[list[str]]:
    """Notes each head that is loaded meanwhile: there is one way to do it."""
    loads: list[str] = []
    load_head = contender.load_head

    def spy(bundle: Bundle, device: Device = "cpu") -> Head:
        loads.append(bundle.digest)
        return load_head(bundle, device)

    with patch.object(contender, "load_head", spy):
        yield loads


def _exact(name: str, value: float, unit: str, aim: str) -> Figure:
    return Figure(name, float(value), float(value), float(value), unit, aim)


if __name__ == "__main__":
    main()
