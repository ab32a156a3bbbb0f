"""Processes of a running service die or freeze in the middle of swaps, and the promises hold."""

from __future__ import annotations

import csv
import http.client
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.bundle import Bundle
from tests.end_to_end.callers import Callers, png
from tests.end_to_end.program import HAPROXY, HEAL_LIMIT_S, Program, doors
from tests.serve.conftest import BundleMaker
from tests.serve.harness import until
from tests.serve.oracle import Heads, expected_scores, some_picture

pytestmark = pytest.mark.cluster

TRIES = 3  # as often as the product's client sends what is safe to repeat
PUSH_TRIES = 40


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for what has to wait."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


def wait_for_file(path: Path) -> None:
    """Until the file is there, without a pause: what follows has to be quick."""
    deadline_s = time.monotonic() + HEAL_LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} was never written"


def blob(service: Program, bundle: Bundle) -> Path:
    """Where the store keeps the bundle's manifest, the last of its files that is written."""
    return service.store / "blobs" / bundle.digest.replace(":", "/")


def assert_whole_again(service: Program, callers: Callers, task: str, seed: int) -> None:
    """The fleet heals without help, the next push works, and no promise was broken meanwhile."""
    service.wait_whole()
    callers.push(seed, task, tries=PUSH_TRIES)
    callers.wait_for(20)
    assert callers.judge() == []
    history = service.view().tasks[task]
    assert [v.change.version for v in history] == [*range(1, len(history) + 1)]
    keys = [v.idempotency_key for v in history]
    assert len(set(keys)) == len(keys)


def test_a_replica_killed_while_a_swap_is_staged_does_not_stop_the_swap(
    service: Program, heads: Heads, pool: ThreadPoolExecutor
) -> None:
    """It is frozen first, so that it certainly has not acknowledged when it dies."""
    victim, survivor = service.replicas()
    callers = Callers(service, heads, (("staged",),), tries=TRIES)
    callers.push(0, "staged")
    with callers:
        callers.wait_for(20)
        victim.suspend()
        push = pool.submit(callers.push, 1, "staged", through=survivor)
        wait_for_file(blob(service, heads(1, "staged")))
        time.sleep(0.2)
        assert not push.done()
        victim.kill()

        assert push.result(HEAL_LIMIT_S)["version"] == 2
        assert_whole_again(service, callers, "staged", 2)


def slow_graph(weight: np.ndarray, side: int = 2200) -> bytes:
    """The affine head of that weight, and a large product that adds nothing but time (0.3 s)."""
    nodes = [
        helper.make_node("Gemm", ["features", "weight"], ["plain"]),
        helper.make_node("ReduceMean", ["features"], ["some"], keepdims=0),
        helper.make_node("Mul", ["some", "zero"], ["nothing"]),  # else it is computed once, early
        helper.make_node("Add", ["table", "nothing"], ["large"]),
        helper.make_node("MatMul", ["large", "large"], ["product"]),
        helper.make_node("ReduceMean", ["product"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "zero"], ["none"]),
        helper.make_node("Add", ["plain", "none"], ["logits"]),
    ]
    weights = {"weight": weight, "zero": np.float32(0), "table": np.ones((side, side), np.float32)}
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["rows", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["rows", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


def test_a_replica_killed_while_a_task_is_held_does_not_stop_the_swap(
    service: Program, heads: Heads, make_bundle: BundleMaker, pool: ThreadPoolExecutor
) -> None:
    """The live head is slow, so a hold has to wait for its rows and lasts long enough to be hit."""
    weight = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    slow = make_bundle("held", seed=0, graph=slow_graph(weight))
    heads.seeds[slow.digest] = 0
    with service.client() as client:
        client.push(slow)
        client.set_task("held", {"max_slowdown": 1000})  # it is pushed again after fast ones
    victim, survivor = service.replicas()
    with Callers(service, heads, (("held",),), tries=TRIES) as callers:
        callers.wait_for(20)
        for seed in range(1, 6):
            record = service.next_record()
            push = pool.submit(callers.push, seed, "held", through=survivor)
            wait_for_file(blob(service, heads(seed, "held")))
            time.sleep(0.05)  # about what it takes to stage
            if not record.exists():
                break
            push.result(HEAL_LIMIT_S)  # too late: all rows were done early
            callers.push_bundle(slow)
        victim.kill()

        assert push.result(HEAL_LIMIT_S)["swap"]["replicas"] == 1
        assert_whole_again(service, callers, "held", 9)


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.05])
def test_a_conductor_killed_in_a_swap_leaves_the_fleet_at_what_the_log_says(
    service: Program, heads: Heads, pool: ThreadPoolExecutor, delay_s: float
) -> None:
    """So long after the bundle was stored: while it is staged, held or committed."""
    task = f"conducted-{1000 * delay_s:.0f}"
    callers = Callers(service, heads, ((task,),), tries=TRIES)
    callers.push(0, task)
    with callers:
        callers.wait_for(20)
        conductor = service.conductor()
        push = pool.submit(callers.push, 1, task, tries=PUSH_TRIES)
        wait_for_file(blob(service, heads(1, task)))
        time.sleep(delay_s)
        conductor.kill()

        assert push.result(HEAL_LIMIT_S)["version"] == 2
        assert_whole_again(service, callers, task, 2)


def test_a_conductor_killed_between_commit_and_flip_leaves_the_fleet_at_the_commit(
    service: Program, heads: Heads, pool: ThreadPoolExecutor
) -> None:
    """The record is in the log, and replicas that were never told find it there."""
    callers = Callers(service, heads, (("committed",),), tries=TRIES)
    callers.push(0, "committed")
    with callers:
        callers.wait_for(20)
        conductor, record = service.conductor(), service.next_record()
        push = pool.submit(callers.push, 1, "committed", tries=PUSH_TRIES)
        wait_for_file(record)
        conductor.kill()
        written = json.loads(record.read_text())

        assert written["changes"][0]["version"] == 2
        assert push.result(HEAL_LIMIT_S)["version"] == 2
        assert service.view().tasks["committed"][1].number == written["number"]
        assert_whole_again(service, callers, "committed", 2)


def test_a_replica_that_hears_of_a_commit_late_answers_by_nothing_older(
    service: Program, heads: Heads, pool: ThreadPoolExecutor
) -> None:
    """It stands still from the commit on; who has a new answer of the other one asks it too."""
    with service.client() as client:
        client.push(heads(0, "late"))
    conductor, (late, other) = service.conductor(), service.replicas()
    for version in range(2, 9):
        record = service.next_record()
        with service.client(other) as client:
            push = pool.submit(client.push, heads(version, "late"))
            wait_for_file(record)
            conductor.suspend()  # so that it has told nobody yet
            late.suspend()
            conductor.resume()
            until(lambda: ask_directly(other, "late") == version)  # noqa: B023 (called at once)
            asked = [pool.submit(ask_directly, late, "late") for _ in range(8)]
            time.sleep(0.1)  # their requests wait at its door
            late.resume()

            assert [answer.result(HEAL_LIMIT_S) for answer in asked] == [version] * 8
            assert push.result(HEAL_LIMIT_S)["version"] == version
    assert {late, other} == set(service.replicas())


def test_a_frozen_replica_never_answers_by_an_older_version(
    service: Program, heads: Heads, pool: ThreadPoolExecutor
) -> None:
    """It is killed and confirmed dead before the push counts; thawed, it says nothing more."""
    frozen, survivor = service.replicas()
    callers = Callers(service, heads, (("frozen",),), tries=TRIES)
    callers.push(0, "frozen")
    with callers:
        callers.wait_for(20)
        frozen.suspend()
        try:
            push = pool.submit(callers.push, 1, "frozen", through=survivor, tries=PUSH_TRIES)
            # Its own caller, that has waited since before the swap.
            asked = pool.submit(ask_directly, frozen, "frozen")

            assert push.result(HEAL_LIMIT_S)["version"] == 2
            assert not frozen.is_running() or frozen.status() == psutil.STATUS_ZOMBIE
        finally:
            if frozen.is_running():
                frozen.send_signal(signal.SIGCONT)
        assert asked.result(HEAL_LIMIT_S) is None
        assert_whole_again(service, callers, "frozen", 2)


def ask_directly(replica: psutil.Process, task: str) -> int | None:
    """The version by which one replica answers, past the front door; None if it does not."""
    try:
        with httpx.Client(base_url=doors(replica)[0], timeout=60) as client:
            answer = client.post(f"/predict/{task}", content=png(some_picture(0)))
    except httpx.HTTPError:
        return None
    return answer.raise_for_status().json()["version"]


def test_a_push_that_the_proxy_repeats_is_one_change(
    service: Program, heads: Heads, pool: ThreadPoolExecutor
) -> None:
    """The replica that took it dies after the record is written; it has no key of the caller's."""
    until(lambda: is_settled(service), limit_s=HEAL_LIMIT_S)
    conductor, record = service.conductor(), service.next_record()
    body = heads(0, "replayed").to_zip()
    answer = pool.submit(send_in_one_piece, service, "/tasks/replayed/versions", body)
    wait_for_file(record)
    # Nobody can be told of the commit now, so the answer is not on its way yet.
    conductor.suspend()
    try:
        assert not answer.done()
        taker = busy_replica(service)
        taker.kill()
    finally:
        conductor.resume()

    assert answer.result(HEAL_LIMIT_S)["version"] == 1
    history = service.view().tasks["replayed"]
    assert [v.change.version for v in history] == [1]
    assert len(history[0].idempotency_key) == 36  # the proxy's UUID
    service.wait_whole()


def send_in_one_piece(service: Program, path: str, body: bytes) -> dict[str, Any]:
    """POST with headers and body in one write, as the proxy's repetition needs it."""
    head = f"POST {path} HTTP/1.1\r\nhost: headstock\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), timeout=HEAL_LIMIT_S) as connection:
        connection.sendall(head.encode() + body)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            answer = response.read()
    assert response.status == 200, answer
    return json.loads(answer)


def behind_the_proxy(service: Program) -> dict[str, dict[str, str]]:
    """HAProxy's row for each replica that it knows, by the replica's address."""
    arguments = service.named(HAPROXY)[-1].cmdline()
    admin = Path(arguments[arguments.index("-f") + 1]).with_name("admin.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(admin))
        connection.sendall(b"show stat\n")
        table = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    rows = csv.DictReader(io.StringIO(table.removeprefix("# ")))
    return {f"http://{row['addr']}": row for row in rows if "REPLICA" in row["svname"]}


def is_settled(service: Program) -> bool:
    """Whether the proxy sends to all the replicas that there are, so that it will not reload."""
    rows = behind_the_proxy(service)
    known = {doors(replica)[0] for replica in service.replicas()}
    return rows.keys() == known and {row["status"] for row in rows.values()} == {"UP"}


def busy_replica(service: Program) -> psutil.Process:
    """The replica that has a request in flight, as HAProxy says."""
    rows = behind_the_proxy(service)
    busy = [r for r in service.replicas() if int(rows[doors(r)[0]]["scur"])]
    assert len(busy) == 1, rows
    return busy[0]


class Readers:
    """Threads that read what is live, and note if it ever goes back."""

    def __init__(self, service: Program) -> None:
        self._service, self._lock, self._newest = service, threading.Lock(), 0
        self._is_over = threading.Event()
        self.num_read, self.went_back = 0, 0

    def read(self) -> None:
        """Read again and again until it is over."""
        with self._service.client() as client:
            while not self._is_over.is_set():
                with self._lock:
                    newest = self._newest
                number = client.tasks()["log_number"]
                with self._lock:
                    self.num_read += 1
                    self.went_back += number < newest
                    self._newest = max(self._newest, number)

    def end(self) -> None:
        """Let the threads return."""
        self._is_over.set()


def test_a_new_replica_joins_at_the_live_version_and_what_is_read_never_goes_back(
    service: Program, heads: Heads, pool: ThreadPoolExecutor
) -> None:
    """A replica dies, heads are pushed while another starts, and it says what the log says."""
    with service.client() as client:
        client.push(heads(0, "joined"))
    victim, survivor = service.replicas()
    readers = Readers(service)
    reading = [pool.submit(readers.read) for _ in range(2)]
    try:
        victim.kill()
        with service.client() as client:
            until(lambda: len(service.replicas()) == 2, limit_s=HEAL_LIMIT_S)
            for seed in (1, 2, 3):
                client.push(heads(seed, "joined"))
            service.wait_whole()
    finally:
        readers.end()
    (joined,) = [replica for replica in service.replicas() if replica.pid != survivor.pid]
    with service.client(joined) as client:
        prediction = client.predict("joined", png(some_picture(0)))

    for thread in reading:
        thread.result(HEAL_LIMIT_S)
    assert readers.num_read > 20
    assert readers.went_back == 0
    assert prediction.version == 4
    scores = list(prediction.scores.values())
    np.testing.assert_allclose(scores, expected_scores(some_picture(0), 3), atol=1e-5)
