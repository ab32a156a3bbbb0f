"""What a fleet counts of requests, batches, swaps and its store: each sample where it belongs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from export.bundle import Bundle
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[LocalFleet]:
    """Two replicas with two tasks."""
    heads = Heads(make_bundle)
    with LocalFleet(tmp_path_factory.mktemp("store"), trunk_folder, replicas=2) as fleet:
        fleet.must_push(heads(1))
        fleet.must_push(heads(2, "shapes"))
        yield fleet


def samples(fleet: LocalFleet) -> dict[str, float]:
    """What `/metrics` says: name and labels, as they are printed, -> value."""
    text = HttpClient(fleet, "replica-1").get("/metrics").text
    return {
        ",".join([s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items()))]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def grown(fleet: LocalFleet, before: dict[str, float], name: str, by: float) -> None:
    """Replicas report every second; until then the sample has not grown."""
    until(lambda: samples(fleet).get(name, 0.0) == before.get(name, 0.0) + by)


def test_every_part_of_a_request_is_timed(fleet: LocalFleet) -> None:
    """Both replicas' requests: decoded, queued, through the trunk, through the heads."""
    before = samples(fleet)
    for name in ("replica-1", "replica-2"):
        assert HttpClient(fleet, name).post("/predict/colours", content=png_of(0)).is_success

    for part in ("request", "decode", "queue", "run", "trunk", "head"):
        name = f"headstock_{part}_seconds_count"
        until(lambda name=name: samples(fleet)[name] >= before[name] + 2)


def test_trunk_and_heads_are_the_run(fleet: LocalFleet) -> None:
    """Together they take no longer than the batch that they are parts of."""
    HttpClient(fleet, "replica-1").post("/predict/colours", content=png_of(0))
    time.sleep(1.2)
    now = samples(fleet)
    trunk, head, run = (now[f"headstock_{part}_seconds_sum"] for part in ("trunk", "head", "run"))

    assert trunk > 0
    assert head > 0
    assert trunk + head < run


def test_rows_are_counted_by_batch_and_task(fleet: LocalFleet) -> None:
    """One picture of two tasks is two rows, one of each."""
    before = samples(fleet)
    HttpClient(fleet, "replica-2").post("/predict?tasks=*", content=png_of(0))

    grown(fleet, before, "headstock_batch_rows_sum", 2)
    grown(fleet, before, "headstock_batch_pictures_sum", 1)
    grown(fleet, before, "headstock_task_rows_total,task=colours", 1)
    grown(fleet, before, "headstock_task_rows_total,task=shapes", 1)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        ("/predict/moods", png_of(0), "unknown_task"),
        ("/predict/colours", b"no picture", "picture"),
        ("/predict/colours", b"", "request"),
    ],
)
def test_errors_are_counted_by_kind(fleet: LocalFleet, path: str, body: bytes, kind: str) -> None:
    """Once each, and by nothing that a caller has written."""
    before = samples(fleet)
    HttpClient(fleet, "replica-1").post(path, content=body)

    grown(fleet, before, f"headstock_errors_total,kind={kind}", 1)


def test_a_swap_is_counted_with_its_phases(fleet: LocalFleet, heads: Heads) -> None:
    """Each phase once, in no more time than the swap took."""
    before = samples(fleet)
    began_s = time.monotonic()
    fleet.must_push(heads(3))
    took_s = time.monotonic() - began_s
    now = samples(fleet)
    name = "headstock_swap_phase_seconds"
    phases = ("stage", "hold", "commit", "flip")
    assert (
        now["headstock_swaps_total,outcome=made"]
        == before["headstock_swaps_total,outcome=made"] + 1
    )
    assert all(
        now[f"{name}_count,phase={p}"] == before[f"{name}_count,phase={p}"] + 1 for p in phases
    )
    spent = sum(now[f"{name}_sum,phase={p}"] - before[f"{name}_sum,phase={p}"] for p in phases)
    assert 0 < spent < took_s


def test_a_vetoed_swap_is_counted_as_such(
    fleet: LocalFleet, make_bundle: Callable[..., Bundle]
) -> None:
    """A replica that cannot stage says no."""
    before = samples(fleet).get("headstock_swaps_total,outcome=vetoed", 0.0)
    fleet.push(make_bundle(trunk="sha256:" + 64 * "0"))

    assert samples(fleet)["headstock_swaps_total,outcome=vetoed"] == before + 1


def test_calls_of_the_store_are_counted(fleet: LocalFleet, heads: Heads) -> None:
    """A record is created once, and what is looked for in vain is absent and no failure."""
    name = "headstock_store_call_seconds_count"
    before = samples(fleet)
    fleet.must_push(heads(4))
    now = samples(fleet)

    assert now[f"{name},call=create,outcome=done"] == before[f"{name},call=create,outcome=done"] + 1
    assert now[f"{name},call=get,outcome=absent"] > 0
    assert not [sample for sample in now if sample.startswith(name) and "failed" in sample]


def test_what_waits_is_shown(fleet: LocalFleet) -> None:
    """Until its caller gives up."""
    batcher = fleet.replicas["replica-1"].batcher
    batcher.hold(frozenset({"colours"}))
    answered = fleet.replicas["replica-1"].ask([png_of(0)], ("colours",), time.monotonic() + 30)
    until(lambda: samples(fleet)["headstock_waiting_requests"] == 1)
    answered.cancel()
    batcher.release()

    until(lambda: samples(fleet)["headstock_waiting_requests"] == 0)
