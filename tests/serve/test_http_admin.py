"""Pushes, rollbacks and what is live, over HTTP and over two replicas."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load, save

from export.bundle import CARD, GOLDEN, HEAD, MANIFEST, Bundle
from serve.autoscale import Decision
from serve.http import admin
from serve.http.routes import http_app
from tests.serve.graphs import head_model, node
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.oracle import Heads, expected_scores, some_picture
from tests.serve.test_http import png_of, problem

PUSH = "/tasks/colours/versions"


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path) -> Iterator[LocalFleet]:
    """Two replicas and nothing pushed yet."""
    with LocalFleet(tmp_path, trunk_folder, replicas=2, max_bundle_bytes=100_000) as fleet:
        yield fleet


@pytest.fixture
def client(fleet: LocalFleet) -> HttpClient:
    """The replica that is asked."""
    return HttpClient(fleet, "replica-1")


@pytest.fixture
def other(fleet: LocalFleet) -> HttpClient:
    """Another replica."""
    return HttpClient(fleet, "replica-2")


def pushed(client: HttpClient, bundle: Bundle, path: str = PUSH, **options: Any) -> dict[str, Any]:
    """The answer to a push that has to succeed."""
    response = client.post(path, content=bundle.to_zip(), **options)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_push_is_live_on_every_replica_when_it_returns(
    client: HttpClient, other: HttpClient, heads: Heads
) -> None:
    """The answer says what it took; the other replica answers by the new head."""
    answer = pushed(client, heads(1))
    prediction = other.post("/predict/colours", content=png_of(0)).json()

    assert (answer["task"], answer["version"], answer["bundle"]) == ("colours", 1, heads(1).digest)
    assert answer["repeated"] is False
    assert answer["swap"]["replicas"] == 2
    assert answer["swap"]["stage_ms"] > 0
    assert answer["swap"]["hold_ms"] > 0
    assert list(prediction["scores"].values()) == pytest.approx(
        expected_scores(some_picture(0), 1), abs=1e-5
    )


def test_a_bundle_may_be_pushed_under_another_name(client: HttpClient, heads: Heads) -> None:
    """The path names the task."""
    answer = pushed(client, heads(1), "/tasks/hues/versions")

    assert answer["task"] == "hues"


@pytest.mark.parametrize("header", ["idempotency-key", "x-request-id"])
def test_a_repeated_push_is_one_change(
    client: HttpClient, other: HttpClient, heads: Heads, header: str
) -> None:
    """The client's key, or the id that the proxy stamps before it sends a request again."""
    first = pushed(client, heads(1), headers={header: "k"})
    again = pushed(other, heads(1), headers={header: "k"})
    conflict = client.post(PUSH, content=heads(2).to_zip(), headers={header: "k"})

    assert (first["version"], again["version"]) == (1, 1)
    assert (first["repeated"], again["repeated"]) == (False, True)
    assert "'k' already made version 1" in problem(conflict, 409)


def test_without_a_key_every_push_is_a_change(client: HttpClient, heads: Heads) -> None:
    """Also of the same bundle."""
    assert [pushed(client, heads(1))["version"] for _ in range(2)] == [1, 2]


def test_what_is_live_is_listed_by_every_replica(
    client: HttpClient, other: HttpClient, heads: Heads, fleet: LocalFleet
) -> None:
    """Tasks, one task and its versions are read from the log, whoever is asked."""
    pushed(client, heads(1), f"{PUSH}?message=first")
    pushed(client, heads(2))
    pushed(client, heads(3, "shapes"), "/tasks/shapes/versions")
    live = other.get("/tasks").json()
    versions = other.get(PUSH).json()["versions"]

    assert live["log_number"] == fleet.view().number
    assert live["trunk"] == heads(1).manifest.trunk
    assert [(t["task"], t["version"], t["bundle"]) for t in live["tasks"]] == [
        ("colours", 2, heads(2).digest),
        ("shapes", 1, heads(3, "shapes").digest),
    ]
    described = other.get("/tasks/colours").json()
    extra = {"settings": described["settings"], "heldout": None}
    assert described == live["tasks"][0] == {**versions[-1], **extra}
    assert [(v["version"], v["action"], v["message"]) for v in versions] == [
        (1, "push", "first"),
        (2, "push", ""),
    ]
    assert [gate["gate"] for gate in versions[0]["gates"]] == [
        "signature",
        "trunk",
        "graph",
        "golden",
        "labels",
        "heldout",
        "accuracy",
        "latency",
    ]
    assert versions[0]["labels"] == ["red", "green", "blue"]


def test_the_number_of_replicas_is_told_with_why(client: HttpClient, fleet: LocalFleet) -> None:
    """A fixed number has no reason; a decision is told with all that it was made from."""
    fixed = client.get("/tasks").json()["replicas"]
    decision = Decision(3, "rise", 12.0, 14.0, 3, 2, 1, 0.5, replica_rate=5.0, startup_s=4.0)
    fleet.decisions.take(decision)
    told = client.get("/tasks").json()["replicas"]

    answering = len(fleet.replicas)
    assert fixed == {"answering": answering, "wanted": None, "last": None, "changes": []}
    assert (told["answering"], told["wanted"]) == (answering, 3)
    assert told["changes"] == [told["last"]]
    assert asdict(decision).items() <= told["last"].items()
    assert told["last"]["text"] == str(decision)


def test_what_is_live_is_told_without_the_conductor(
    client: HttpClient, fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is gone, and one that hangs."""

    async def hang(*_: object) -> object:
        await asyncio.sleep(60)

    monkeypatch.setattr(admin, "CONDUCTOR_WAIT_S", 0.1)
    link = fleet.links["replica-1"]
    monkeypatch.setattr(link, "replicas", hang)
    hanging = client.get("/tasks").json()
    monkeypatch.undo()
    fleet.crash_conductor()
    alone = client.get("/tasks").json()

    assert hanging["replicas"] is alone["replicas"] is None
    assert hanging["log_number"] == alone["log_number"] == fleet.view().number


def test_the_card_is_the_live_bundles(client: HttpClient, heads: Heads) -> None:
    """As Markdown."""
    pushed(client, heads(1))
    pushed(client, heads(2))
    response = client.get("/tasks/colours/card")

    assert response.headers["content-type"].startswith("text/markdown")
    assert response.content == heads(2).files[CARD]


@pytest.mark.parametrize("path", ["", "/versions", "/card"])
def test_an_unknown_task_has_nothing_to_read(client: HttpClient, heads: Heads, path: str) -> None:
    """404 with the closest names."""
    pushed(client, heads(1))
    detail = problem(client.get(f"/tasks/color{path}"), 404)

    assert "The closest names are: colours" in detail


def test_a_rollback_makes_the_bundle_before_live_again(
    client: HttpClient, other: HttpClient, heads: Heads
) -> None:
    """With or without a body; its version is the next."""
    for seed in (1, 2, 3):
        pushed(client, heads(seed))
    back = client.post("/tasks/colours/rollback").json()
    first = other.post("/tasks/colours/rollback", json={"to": 1, "expected": 4, "message": "why"})
    last = client.get("/tasks/colours").json()

    assert (back["version"], back["bundle"]) == (4, heads(2).digest)
    assert (first.json()["version"], first.json()["bundle"]) == (5, heads(1).digest)
    assert (last["action"], last["rolled_back_to"], last["message"]) == ("rollback", 1, "why")


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"to": 9}, 409, "no version 9"),
        ({"to": 1, "expected": 1}, 409, "at version 2; expected version 1"),
        ({"to": 0}, 400, "to is 0; expected a version"),
        ({"to": "1"}, 400, "to is '1'"),
        ({"to": True}, 400, "to is True"),
        ({"expected": -1}, 400, "expected is -1"),
        ({"version": 1}, 400, "Field 'version' is unknown"),
        ([1], 400, "JSON list; expected an object"),
        ({"message": "\ud800"}, 400, "message"),
        ({"message": 5}, 400, "message"),
        ({"message": "x" * 2001}, 400, "message"),
    ],
)
def test_a_rollback_that_cannot_be_says_why(
    client: HttpClient, heads: Heads, body: object, status: int, reason: str
) -> None:
    """Malformed or in conflict; nothing changes."""
    for seed in (1, 2):
        pushed(client, heads(seed))
    # Not httpx's own JSON, which cannot write half a surrogate pair.
    response = client.post("/tasks/colours/rollback", content=json.dumps(body))
    detail = problem(response, status)

    assert reason in detail
    assert client.get("/tasks/colours").json()["version"] == 2


def test_a_task_that_was_never_pushed_cannot_be_rolled_back(client: HttpClient) -> None:
    """404."""
    assert "never pushed" in problem(client.post("/tasks/colours/rollback"), 404)


@pytest.mark.parametrize(
    ("path", "headers", "reason"),
    [
        ("/tasks/Colours/versions", {}, "task is 'Colours'"),
        ("/tasks/-/versions", {}, "task is '-'"),
        (f"/tasks/{'a' * 64}/versions", {}, "task is"),
        (f"{PUSH}?new_labels=yes", {}, "new_labels is 'yes'"),
        (f"{PUSH}?canary=10%", {}, "The share is '10%'"),
        (f"{PUSH}?shadow=1", {}, "shadow is '1'"),
        (f"{PUSH}?cannary=0.1", {}, "Parameter 'cannary' is unknown"),
        (PUSH, {"idempotency-key": "k" * 257}, "idempotency-key is"),
    ],
)
def test_a_push_that_is_malformed_says_why(
    client: HttpClient, heads: Heads, path: str, headers: dict[str, str], reason: str
) -> None:
    """What is not understood is refused, not ignored: the push would be live for everyone."""
    response = client.post(path, content=heads(1).to_zip(), headers=headers)

    assert reason in problem(response, 400)
    assert client.get("/tasks").json()["tasks"] == []


def test_a_push_of_nothing_is_malformed(client: HttpClient) -> None:
    """An empty body is no bundle."""
    assert "body is empty" in problem(client.post(PUSH), 400)


def test_a_push_of_too_many_bytes_is_too_large(client: HttpClient) -> None:
    """The bound of bundles is their own."""
    problem(client.post(PUSH, content=bytes(100_001)), 413)


def test_changed_labels_have_to_be_declared(
    client: HttpClient, heads: Heads, make_bundle: Callable[..., Bundle]
) -> None:
    """422, and with the declaration 200."""
    changed = make_bundle(seed=2, labels=("blue", "green", "red"))
    pushed(client, heads(1))
    refused = client.post(PUSH, content=changed.to_zip())

    assert "the order differs" in problem(refused, 422)
    assert pushed(client, changed, f"{PUSH}?new_labels=true")["version"] == 2


def test_a_refused_bundle_is_told_every_gate_that_was_asked(
    client: HttpClient, make_bundle: Callable[..., Bundle]
) -> None:
    """The gates in their order, up to the one that said no; its reason is the detail."""
    loop = head_model([node("Loop", "features", "logits")]).SerializeToString()
    response = client.post(PUSH, content=make_bundle(graph=loop).to_zip())
    detail = problem(response, 422)

    gates = response.json()["gates"]
    assert [(gate["gate"], gate["passed"]) for gate in gates] == [
        ("signature", True),
        ("trunk", True),
        ("graph", False),
    ]
    assert detail == gates[-1]["reason"]
    assert "operator Loop" in detail


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip of any files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def truncated(data: bytes) -> bytes:
    """Without its end."""
    return data[: len(data) * 2 // 3]


def flipped(data: bytes) -> bytes:
    """With one bit in its middle changed."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("name", [MANIFEST, HEAD, GOLDEN, CARD])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "swapped"])
def test_a_corrupt_bundle_changes_nothing(
    client: HttpClient, heads: Heads, name: str, how: str
) -> None:
    """Every file of it, cut, changed, left out or taken from another bundle: 422 with a reason."""
    pushed(client, heads(1))
    files = {MANIFEST: heads(2).manifest_bytes, **heads(2).files}
    if how == "missing":
        del files[name]
    elif how == "swapped":
        files[name] = {MANIFEST: heads(3).manifest_bytes, **heads(3).files}[name]
    else:
        files[name] = (truncated if how == "truncated" else flipped)(files[name])
    detail = problem(client.post(PUSH, content=zipped(files)), 422)

    assert "manifest" in detail or name in detail
    assert client.get("/tasks/colours").json()["bundle"] == heads(1).digest
    assert client.post("/predict/colours", content=png_of(0)).json()["version"] == 1


def test_a_zip_with_a_file_more_is_refused(client: HttpClient, heads: Heads) -> None:
    """Nothing comes along that the manifest does not name."""
    files = {MANIFEST: heads(1).manifest_bytes, **heads(1).files, "extra.py": b"import os"}

    assert "extra.py is not listed" in problem(client.post(PUSH, content=zipped(files)), 422)


@pytest.mark.parametrize("make", [truncated, flipped])
def test_a_corrupt_zip_is_refused(
    client: HttpClient, heads: Heads, make: Callable[[bytes], bytes]
) -> None:
    """Whatever zipfile makes of it."""
    problem(client.post(PUSH, content=make(heads(1).to_zip())), 422)


def test_what_is_no_zip_is_refused(client: HttpClient) -> None:
    """As a bundle with a reason, not as a failure."""
    assert "damaged, or is none" in problem(client.post(PUSH, content=b"no zip at all"), 422)


def test_a_head_and_golden_samples_that_do_not_belong_together_are_refused(
    client: HttpClient, heads: Heads, make_bundle: Callable[..., Bundle]
) -> None:
    """The manifest agrees with both files, and the golden gate does not."""
    samples = load(heads(2).files[GOLDEN])
    bundle = make_bundle(seed=1, golden=save(samples))

    assert "do not reproduce" in problem(client.post(PUSH, content=bundle.to_zip()), 422)


def samples(response: httpx.Response) -> dict[str, float]:
    """Samples of the metrics by name and labels."""
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in text_string_to_metric_families(response.text)
        for s in family.samples
    }


def test_metrics_are_the_fleets(
    client: HttpClient, other: HttpClient, heads: Heads, fleet: LocalFleet
) -> None:
    """Either replica tells the sum of both, also when one of them is gone."""
    pushed(client, heads(1))
    for asked in (client, other, other):
        asked.post("/predict/colours", content=png_of(0))
    asked_series = "headstock_requests_total[('route', '/predict/{task}'), ('status', '200')]"
    until(lambda: samples(client.get("/metrics")).get(asked_series) == 3)
    fleet.kill("replica-2")
    after = samples(client.get("/metrics"))

    assert after[asked_series] == 3
    assert after["headstock_live_version[('task', 'colours')]"] == 1
    assert after["headstock_replicas[]"] == 1


def test_health_is_of_this_replica(
    client: HttpClient, fleet: LocalFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live while its threads live; ready when the conductor has admitted it."""
    before = [client.get(f"/v2/health/{kind}").status_code for kind in ("live", "ready")]
    fleet.replicas["replica-1"].watcher._admitted.clear()
    fleet.links["replica-1"].is_cut = True
    waiting = [client.get(f"/v2/health/{kind}").status_code for kind in ("live", "ready")]
    monkeypatch.setattr(type(fleet.replicas["replica-1"].batcher), "is_alive", False)
    broken = [client.get(f"/v2/health/{kind}").status_code for kind in ("live", "ready")]

    assert (before, waiting, broken) == ([200, 200], [200, 503], [503, 503])


def test_without_a_conductor_predictions_go_on_and_changes_wait_for_the_next(
    client: HttpClient, heads: Heads, fleet: LocalFleet
) -> None:
    """A push that finds none is sent again until there is one."""
    pushed(client, heads(1))
    fleet.crash_conductor()
    prediction = client.post("/predict/colours", content=png_of(0))
    metrics = client.get("/metrics")
    threading.Timer(0.2, fleet.start_conductor).start()
    answer = pushed(client, heads(2))

    assert prediction.json()["version"] == 1
    assert metrics.headers["retry-after"] == "1"
    problem(metrics, 503)
    assert answer["version"] == 2


def test_a_full_queue_says_when_to_come_back(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """503 at once with Retry-After, and no task is lost by it."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1, max_queued=1) as fleet:
        fleet.must_push(heads(1))
        client = HttpClient(fleet, "replica-1")
        batcher = fleet.replicas["replica-1"].batcher
        batcher.hold(frozenset({"colours"}))
        waits = threading.Thread(
            target=client.post, args=("/predict/colours",), kwargs={"content": png_of(0)}
        )
        waits.start()
        until(lambda: len(batcher._waiting) == 1)
        refused = client.post("/predict/colours", content=png_of(0))
        batcher.release()
        waits.join(5)

    assert refused.headers["retry-after"] == "1"
    assert "1 requests wait already" in problem(refused, 503)


def test_an_answer_that_takes_too_long_is_given_up(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """And its rows are taken out of the queue."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1, request_timeout_s=0.1) as fleet:
        fleet.must_push(heads(1))
        batcher = fleet.replicas["replica-1"].batcher
        batcher.hold(frozenset({"colours"}))
        late = HttpClient(fleet, "replica-1").post("/predict/colours", content=png_of(0))
        until(lambda: not batcher._waiting)
        batcher.release()

    assert "No answer within 0.1 s" in problem(late, 503)


def test_a_caller_that_goes_away_is_no_failure_of_the_service(
    fleet: LocalFleet, heads: Heads, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a body and then nothing: counted as the caller's, and no error in the log."""
    fleet.must_push(heads(1))
    app = http_app(fleet.replicas["replica-1"], fleet.links["replica-1"])
    messages = [{"type": "http.request", "body": b"half", "more_body": True}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/predict/colours",
        "query_string": b"",
        "headers": [],
    }
    asyncio.run(app(scope, receive, send))

    assert sent[0]["status"] == 400
    assert "failed" not in caplog.text
