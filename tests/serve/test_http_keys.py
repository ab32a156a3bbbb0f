"""Signing keys over HTTP, from Python and by commands, on two replicas."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from export.bundle import SIGNATURE, Bundle
from export.keys import load_private_key, new_key
from export.sign import sign
from serve.client import Client, ClientError
from tests.serve.commands import Run
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.signers import key_of, trusting
from tests.serve.test_http import problem

PUSH = "/tasks/colours/versions"
CI = trusting(1).key_id


def pem_of(seed: int) -> str:
    """The text of the public key of that seed."""
    public = key_of(seed).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def trust(http: HttpClient, seed: int = 1, **fields: Any) -> dict[str, Any]:
    """The answer to a request for trust that has to succeed."""
    wanted = {"public_key": pem_of(seed), "name": f"key{seed}", **fields}
    response = http.post("/keys", json=wanted)
    assert response.status_code == 200, response.text
    return response.json()


def signed(bundle: Bundle, seed: int = 1, *, task: str = "colours", minute: int = 0) -> bytes:
    """The zip of a bundle, signed so many minutes from an hour ago."""
    at = datetime.now(UTC) - timedelta(minutes=60 - minute)
    return sign(bundle, key_of(seed), task=task, signed_at=at).to_zip()


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path) -> Iterator[LocalFleet]:
    """Two replicas and nothing pushed yet."""
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=2) as fleet:
        yield fleet


def test_trust_in_a_key_is_told_by_every_replica(fleet: LocalFleet, http: HttpClient) -> None:
    """What it may sign and until when, in UTC; and who said so when."""
    assert http.get("/keys").json() == {"signatures_required": False, "keys": []}
    answer = trust(http, tasks=["colours", "pets*"], until="2099-01-01", message="first key")
    told = HttpClient(fleet, "replica-2").get("/keys").json()
    (said,) = answer["history"]

    assert told == {"signatures_required": True, "keys": [answer]}
    assert (answer["key_id"], answer["name"], answer["state"]) == (CI, "key1", "trusted")
    assert answer["public_key"] == trusting(1).public_key
    assert answer["tasks"] == ["colours", "pets*"]
    assert answer["valid_until"] == "2099-01-01T00:00:00Z"
    assert answer["signed_live"] == []
    assert (said["action"], said["message"]) == ("trust", "first key")
    assert said["written_at"].startswith(str(datetime.now(UTC).year))
    assert said["record"] == fleet.view().number


def test_a_key_is_revoked_and_what_it_signed_stays_live(http: HttpClient, heads: Heads) -> None:
    """The answer says which live versions those are."""
    trust(http)
    trust(http, 2)
    for seed, key in ((1, 1), (2, 2)):
        task = f"colours{seed}"
        data = signed(heads(seed), key, task=task)
        assert http.post(f"/tasks/{task}/versions", content=data).status_code == 200
    revoked = http.request("DELETE", f"/keys/{CI}?message=lost").json()
    again = http.request("DELETE", f"/keys/{CI}").json()

    assert revoked["state"] == "revoked"
    assert revoked["signed_live"] == [{"task": "colours1", "version": 1}]
    assert [(s["action"], s["message"]) for s in revoked["history"]] == [
        ("trust", ""),
        ("revoke", "lost"),
    ]
    assert again == revoked
    assert [task["version"] for task in http.get("/tasks").json()["tasks"]] == [1, 1]


def test_a_candidate_has_its_own_signer(http: HttpClient, heads: Heads) -> None:
    """Who is named with what it answers for, and when that key is revoked."""
    trust(http)
    trust(http, 2)
    http.post(PUSH, content=signed(heads(1), minute=1))
    pushed = http.post(f"{PUSH}?canary=0.5", content=signed(heads(2), 2, minute=2))
    shown = http.get("/tasks/colours").json()
    revoked = http.request("DELETE", f"/keys/{trusting(2).key_id}").json()

    assert pushed.status_code == 200
    assert (shown["signed_by"]["name"], shown["candidate"]["signed_by"]["name"]) == ("key1", "key2")
    assert set(shown["candidate"]) == {"bundle", "labels", "share", "signed_by"}
    assert revoked["signed_live"] == [{"task": "colours", "version": 2}]
    assert "was revoked" in problem(http.post("/tasks/colours/promote"), 422)


def test_from_the_first_key_on_pushes_must_be_signed(http: HttpClient, heads: Heads) -> None:
    """Before it the verdict says that nobody asked."""
    assert http.post(PUSH, content=heads(1).to_zip()).status_code == 200
    before = http.get("/tasks/colours").json()
    trust(http)
    refused = http.post(PUSH, content=heads(2).to_zip())
    admitted = http.post(PUSH, content=signed(heads(2)))
    after = http.get("/tasks/colours").json()

    assert before["signed_by"] is None
    assert before["gates"][0] == {
        "task": "colours",
        "gate": "signature",
        "passed": True,
        "skipped": False,
        "reason": "not signed: no key was ever trusted here, so none is asked for",
    }
    assert "The bundle is not signed" in problem(refused, 422)
    assert [gate["gate"] for gate in refused.json()["gates"]] == ["signature"]
    assert admitted.status_code == 200
    assert (after["signed_by"]["name"], after["signed_by"]["key_id"]) == ("key1", CI)
    assert after["signed_by"]["signed_at"].endswith("Z")
    assert after["gates"][0]["reason"].startswith(f"signed by key1 ({CI[:12]}) at ")


def test_an_old_signature_is_a_conflict(http: HttpClient, heads: Heads) -> None:
    """409, with what to do; the same request again is none."""
    trust(http)
    old = signed(heads(1), minute=1)
    first = http.post(PUSH, content=old, headers={"idempotency-key": "k"})
    again = http.post(PUSH, content=old, headers={"idempotency-key": "k"})
    replayed = http.post(PUSH, content=old)

    assert (first.json()["version"], again.json()["version"]) == (1, 1)
    assert "Sign it again, or roll back." in problem(replayed, 409)


def test_a_repeated_request_about_a_key_has_the_same_answer(http: HttpClient) -> None:
    """As of its own record, whatever was said since."""
    keyed = {"headers": {"idempotency-key": "k"}}
    wanted = {"public_key": pem_of(1), "name": "ci"}
    first = http.post("/keys", json=wanted, **keyed).json()
    http.request("DELETE", f"/keys/{CI}")
    again = http.post("/keys", json=wanted, **keyed).json()
    conflict = http.post("/keys", json={**wanted, "name": "other"}, **keyed)

    assert first == again
    assert "'k' already changed the trust in key ci" in problem(conflict, 409)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"public_key": None}, "public_key is missing"),
        ({"public_key": 5}, "public_key is missing"),
        ({"public_key": "ssh-ed25519 AAAA"}, "public_key: This is no public key in PEM form"),
        ({"public_key": "\ud800"}, "public_key: This is no public key"),
        ({"name": None}, "name is None"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"tasks": "pets*"}, "tasks is 'pets*'; expected a list"),
        ({"tasks": []}, "tasks is"),
        ({"tasks": ["Pets"]}, "tasks is 'Pets'"),
        ({"tasks": [5]}, "tasks is 5"),
        ({"until": "tomorrow"}, "until is 'tomorrow'; expected a date or a time"),
        ({"until": 5}, "until is 5"),
        ({"until": "9999-12-31T23:59:59-01:00"}, "valid_until is"),
        ({"message": 5}, "message is 5"),
        ({"message": "x" * 2001}, "message is"),
        ({"more": 1}, "Field 'more' is unknown; expected public_key, name, tasks, until, message."),
    ],
)
def test_what_cannot_be_trusted_says_why(
    fleet: LocalFleet, http: HttpClient, fields: dict[str, object], reason: str
) -> None:
    """400, and nothing is written."""
    before = fleet.view()
    wanted = {"public_key": pem_of(1), "name": "ci", **fields}
    # Not httpx's own JSON, which cannot write half a surrogate pair.
    response = http.post("/keys", content=json.dumps(wanted))

    assert reason in problem(response, 400)
    assert fleet.view() == before


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/keys/ci", 400, "key_id is 'ci'"),
        (f"/keys/{'0' * 64}", 404, "was never trusted"),
        (f"/keys/{CI}?force=1", 400, "Parameter 'force' is unknown"),
    ],
)
def test_a_key_that_cannot_be_revoked_says_why(
    http: HttpClient, path: str, status: int, reason: str
) -> None:
    """Over HTTP it is named by its whole id."""
    assert reason in problem(http.request("DELETE", path), status)


def test_the_client_signs_and_speaks_of_keys(connect: Callable[..., Client], heads: Heads) -> None:
    """As the commands do."""
    client = connect()
    trusted = client.trust_key(pem_of(1), name="ci", tasks=["col*"], until="2099-01-01")
    pushed = client.push(heads(1), sign_with=key_of(1))
    elsewhere = client.revoke_key(CI, message="lost")

    assert client.keys()["keys"] == [elsewhere]
    assert (trusted["state"], elsewhere["state"]) == ("trusted", "revoked")
    assert elsewhere["signed_live"] == [{"task": "colours", "version": pushed["version"]}]
    with pytest.raises(ClientError, match="which was revoked") as refused:
        client.push(heads(2), sign_with=key_of(1))
    assert refused.value.status == 422


# Commands


def test_the_way_of_a_key(fleet: LocalFleet, run: Run, heads: Heads, tmp_path: Path) -> None:
    """Made, trusted, used, rotated and revoked."""
    for seed in (1, 2):
        heads(seed).write(tmp_path / f"head{seed}")
    made = run("keys", "new", "ci", "--out", str(tmp_path), "--json")
    run("keys", "new", "ci-2027", "--out", str(tmp_path))
    key_id = json.loads(made.out)["key_id"]
    none_yet = run("keys", "list")
    trusted = run("keys", "trust", f"{tmp_path}/ci.pub", "--tasks", "col*", "--until", "2099-01-01")
    unsigned = run("push", f"{tmp_path}/head1")
    pushed = run("push", f"{tmp_path}/head1", "--key", f"{tmp_path}/ci.key")
    status, history = run("status"), run("history", "colours")
    run("keys", "trust", f"{tmp_path}/ci-2027.pub")
    revoked = run("keys", "revoke", key_id[:8], "--message", "rotated")
    refused = run("push", f"{tmp_path}/head2", "--key", f"{tmp_path}/ci.key")
    rotated = run("push", f"{tmp_path}/head2", "--key", f"{tmp_path}/ci-2027.key")
    listed = run("keys", "list")

    who = f"ci ({key_id[:12]})"
    assert none_yet.out == "no key was ever trusted here, so pushes need no signature\n"
    assert trusted.out == f"{who} may sign for col* until 2099-01-01T00:00:00Z\n"
    assert (unsigned.code, "is not signed" in unsigned.err) == (1, True)
    assert pushed.code == 0
    assert who in status.out
    assert who in history.out
    assert revoked.out.splitlines() == [
        f"{who} is revoked on every replica",
        "Signed by it and still live: colours 1. Roll back or push what should not be.",
    ]
    assert (refused.code, "which was revoked" in refused.err) == (1, True)
    assert rotated.code == 0
    ci, new = listed.out.splitlines()[3:5]
    assert "revoked" in ci
    assert "colours 2" in new
    assert not (tmp_path / "head1" / SIGNATURE).exists()
    assert [v.change.version for v in fleet.view().tasks["colours"]] == [1, 2]


def test_a_bundle_is_signed_for_the_task_that_it_is_pushed_to(
    http: HttpClient, run: Run, heads: Heads, tmp_path: Path
) -> None:
    """Whatever task it was made for."""
    heads(1).write(tmp_path / "head")
    new_key("ci", tmp_path)
    run("keys", "trust", f"{tmp_path}/ci.pub")
    run("push", f"{tmp_path}/head", "--task", "hues", "--key", f"{tmp_path}/ci.key")

    assert http.get("/tasks/hues").json()["signed_by"]["name"] == "ci"


def test_a_passphrase_comes_from_the_environment(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For making the key and for using it."""
    monkeypatch.setenv("HEADSTOCK_KEY_PASSPHRASE", "sesame")
    made = run("keys", "new", "ci", "--out", str(tmp_path))

    assert "ci.key (encrypted)" in made.out
    assert load_private_key(tmp_path / "ci.key", lambda: "sesame")


def test_a_passphrase_is_asked_for_twice_on_a_terminal(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once when the key is used; nothing of it is shown."""
    typed = ["sesame", "sesam", "sesame", "sesame"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)

    def answer(_: str) -> str:
        return typed.pop(0)

    monkeypatch.setattr("getpass.getpass", answer)
    made = run("keys", "new", "ci", "--out", str(tmp_path))

    assert made.code == 0, made.err
    assert typed == []
    assert load_private_key(tmp_path / "ci.key", lambda: "sesame")
    assert "sesam" not in made.out + made.err


def test_an_encrypted_key_without_its_passphrase_says_how_to_give_it(
    run: Run, heads: Heads, tmp_path: Path
) -> None:
    """One line, and nothing is pushed."""
    heads(1).write(tmp_path / "head")
    words = "sesame"
    new_key("ci", tmp_path, passphrase=words)
    done = run("push", f"{tmp_path}/head", "--key", f"{tmp_path}/ci.key")

    assert (done.code, done.out) == (1, "")
    assert "ci.key is encrypted; expected its passphrase, on a terminal or as HEADSTOCK_KEY" in (
        done.err
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("revoke", "nobody"), "No key is called 'nobody'; there are ci ("),
        (("revoke", CI[:7]), "No key is called"),
        (("revoke", "twice"), "Several keys are called 'twice'; there are twice ("),
    ],
)
def test_a_key_that_is_not_meant_is_not_revoked(
    fleet: LocalFleet, run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    """A name or an id has to say which."""
    fleet.trust(trusting(1, name="ci"))
    for seed in (2, 3):
        fleet.trust(trusting(seed, name="twice"))
        fleet.revoke(trusting(seed).key_id)
    done = run("keys", *arguments)

    assert (done.code, done.out) == (1, "")
    assert reason in done.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("keys", "new", "../ci"), "cannot be a key's name"),
        (("keys", "trust", "nothing.pub"), "There is no key at nothing.pub"),
        (("keys", "trust", __file__), "no public key in PEM form"),
        (("push", "nothing", "--key", "nothing.key"), "There is no key at nothing.key"),
    ],
)
def test_a_command_that_cannot_go_on_says_why_in_one_line(
    fleet: LocalFleet, run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    """Exit code 1, nothing on the standard output."""
    done = run(*arguments)

    assert (done.code, done.out) == (1, "")
    assert reason in done.err
    assert done.err.count("\n") == 1
    assert fleet.view().signing_keys == {}
