"""The store is away while a fleet serves: answers go on, pushes fail clearly, then all is well."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from serve.record import Record
from tests.serve.faulty import Fault, FaultyServer
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Crowd, Heads, judge

PUSH = "/tasks/colours/versions"

pytestmark = pytest.mark.usefixtures("soon")


@pytest.mark.parametrize("fault", ["refuse", "silent", "503"])
def test_answers_go_on_and_pushes_say_503_while_the_store_is_away(
    faulty: FaultyServer, s3_url: str, trunk_folder: Path, heads: Heads, fault: Fault
) -> None:
    """A push, a rollback, settings and what is live; and after it the same push works."""
    with LocalFleet(s3_url, trunk_folder, replicas=2) as fleet:
        client = HttpClient(fleet, "replica-1")
        fleet.must_push(heads(1))
        fleet.must_push(heads(2))
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            crowd.wait_for(5)
            faulty.plan(fault, times=1e9)
            refused = [
                client.post(PUSH, content=heads(3).to_zip(), headers={"idempotency-key": "k"}),
                client.post("/tasks/colours/rollback"),
                client.request("PATCH", "/tasks/colours", json={"weight": 2}),
                client.get("/tasks"),
            ]
            crowd.wait_for(20)
            faulty.heal()
            pushed = client.post(PUSH, content=heads(3).to_zip(), headers={"idempotency-key": "k"})
            crowd.wait_for(5)
        log = fleet.view()

    assert [response.status_code for response in refused] == [503] * 4
    for response in refused:
        assert response.headers["retry-after"] == "1"
        assert s3_url in response.json()["detail"]
    assert (pushed.status_code, pushed.json()["version"]) == (200, 3)
    assert judge(crowd.seen, log, heads.seeds) == []


def test_an_outage_in_the_middle_of_a_swap_ends_in_what_the_log_says(
    faulty: FaultyServer, s3_url: str, trunk_folder: Path, heads: Heads
) -> None:
    """The put is lost; the pusher hears 503 in time, and with its key what came of it."""
    with LocalFleet(s3_url, trunk_folder, replicas=2, hold_s=0.3, request_timeout_s=1.0) as fleet:
        client = HttpClient(fleet, "replica-1")
        fleet.must_push(heads(1))
        fleet.must_push(heads(5, "shapes"))

        def lose_the_store(record: Record) -> None:
            if record.kind == "commit":
                fleet.log.before_put = lambda _: None
                faulty.plan("refuse", times=1e9)

        fleet.log.before_put = lose_the_store
        with Crowd(fleet, (("shapes",),), clients=2) as crowd:
            began_s = time.monotonic()
            late = client.post(PUSH, content=heads(2).to_zip(), headers={"idempotency-key": "k"})
            late_s = time.monotonic() - began_s
            crowd.wait_for(20)
            faulty.heal()
            again = client.post(PUSH, content=heads(2).to_zip(), headers={"idempotency-key": "k"})
            until(lambda: fleet.live_versions("colours") == {2})
        log = fleet.view()

    assert late.status_code == 503
    assert late_s < 4
    assert "may still be made. Ask again with the idempotency key 'k'" in late.json()["detail"]
    assert (again.status_code, again.json()["version"]) == (200, 2)
    assert [version.change.version for version in log.tasks["colours"]] == [1, 2]
    assert judge(crowd.seen, log, heads.seeds) == []


def test_a_replica_that_joins_while_the_store_is_away_waits(
    faulty: FaultyServer, s3_url: str, trunk_folder: Path, heads: Heads
) -> None:
    """It answers as soon as the store does, and with what is live then."""
    with LocalFleet(s3_url, trunk_folder, replicas=1) as fleet:
        fleet.must_push(heads(1))
        log = type(fleet.log)(s3_url)
        faulty.plan("503", times=1e9)
        names: list[str] = []
        joining = threading.Thread(target=lambda: names.append(fleet.start_replica(log=log)))
        joining.start()
        joining.join(timeout=1.0)
        was_waiting = joining.is_alive()
        faulty.heal()
        joining.join(timeout=10)
        fleet.wait_admitted(names[0])

        assert was_waiting
        assert fleet.live_versions("colours") == {1}


def test_faults_here_and_there_cost_no_answer_and_no_push(
    faulty: FaultyServer, s3_url: str, trunk_folder: Path, heads: Heads
) -> None:
    """Every fifth request to the store fails, before or after it has acted; ten pushes succeed."""
    with LocalFleet(s3_url, trunk_folder, replicas=2, hold_s=2.0) as fleet:
        fleet.must_push(heads(0))
        for fault in ("forget", "503", "refuse", "500"):
            faulty.plan(fault, times=10, only=lambda _, __: len(faulty.seen) % 5 == 0)
        with Crowd(fleet, (("colours",),), clients=2) as crowd:
            versions = [fleet.must_push(heads(seed)) for seed in range(1, 11)]
            crowd.wait_for(5)
        faulty.heal()
        log = fleet.view()

    assert versions == list(range(2, 12))
    assert judge(crowd.seen, log, heads.seeds) == []
