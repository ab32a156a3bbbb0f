"""Who is let in over HTTP, on two replicas: each route asks for a token that names what it does."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from serve.http.routes import http_app
from serve.messages import Swapped
from tests.serve.commands import Run
from tests.serve.harness import HttpClient, LocalFleet, until
from tests.serve.holders import bearer, token_for, token_text
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of, problem
from tests.serve.test_http_oip import error, image

ADMIN = {"authorization": f"Bearer {'a' * 64}"}
OPEN = {
    "/docs",
    "/docs/rapidoc-min.js",
    "/openapi.json",
    "/v2/health/live",
    "/v2/health/ready",
}
DOCS = (Path(__file__).parents[2] / "docs" / "access.md").read_text()


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """Two replicas that ask for tokens, and three tasks."""
    settings = {"access": "on", "admin_token": "a" * 64}
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=2, **settings) as fleet:
        for seed, task in enumerate(("colours", "pets", "pets-2"), start=1):
            fleet.must_push(heads(seed, task))
        yield fleet


def give(fleet: LocalFleet, *scopes: str, seed: int = 1, **fields: Any) -> dict[str, str]:
    """The header of a token for these scopes, which the fleet knows from now on."""
    assert isinstance(fleet.issue(token_for(seed, *scopes, **fields)), Swapped)
    return bearer(seed)


def routes(fleet: LocalFleet) -> list[tuple[str, str]]:
    """Every method and path that there is, with names in place of their parameters."""
    app = http_app(fleet.replicas["replica-1"], fleet.links["replica-1"])
    found = [route for route in app.routes if isinstance(route, Route)]
    assert len(found) == len(app.routes)
    return [
        (method, route.path)
        for route in found
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]


def filled(path: str) -> str:
    """A path with something in place of each parameter."""
    names = {"key_id": "0" * 64, "token_id": "0" * 12, "digest": "0" * 64}
    return path.format(task="pets", model="pets", version=1, **names)


def told(path: str, answer: httpx.Response, status: int) -> str:
    """Why a request was refused, in the form of its path."""
    return error(answer, status) if path.startswith("/v2") else problem(answer, status)


def test_every_route_but_health_and_docs_asks_for_a_token(
    fleet: LocalFleet, http: HttpClient
) -> None:
    """Whatever routes there are: none is open by default."""
    found = routes(fleet)
    answers = {(m, p): http.request(m, filled(p)) for m, p in found}

    assert {p for (_, p), a in answers.items() if a.status_code == 200} == OPEN
    for (_, path), answer in answers.items():
        if path not in OPEN:
            assert "has no token" in told(path, answer, 401)
            assert answer.headers["www-authenticate"] == 'Bearer realm="headstock"'
    assert fleet.view().number == len(("trunk", "fence", *fleet.view().tasks))


def test_every_route_needs_the_scope_that_is_documented(
    fleet: LocalFleet, http: HttpClient
) -> None:
    """A token that opens nothing is told which scope it lacks, as the table says it."""
    useless = give(fleet, "predict:nothing")
    asked = {(m, p): http.request(m, filled(p), headers=useless) for m, p in routes(fleet)}
    rows = [line.split("|") for line in DOCS.splitlines() if line.startswith("| `")]
    table = {
        tuple(route.strip(" `").split(" ")): row[2].strip(" `")
        for row in rows
        for route in row[1].split(",")
        if route.strip(" `").split(" ")[0] in {"GET", "POST", "PUT", "PATCH", "DELETE"}
    }

    assert table.keys() == asked.keys()
    for (method, path), answer in asked.items():
        needs = table[method, path]
        if "{task}" in path or "{model}" in path:
            named = needs.replace("TASK", "pets").replace("read", "predict:pets")
            assert f'scope="{named}"' in answer.headers["www-authenticate"], (method, path)
            assert "lacks the scope" in told(path, answer, 403)
        elif needs in {"admin", "metrics", "push:TASK"}:
            assert f'scope="{needs}"' in answer.headers["www-authenticate"], (method, path)
        else:
            assert answer.status_code != 403, (method, path)
            assert needs in {"open", "read", "predict:TASK"}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic YTph"},
        {"authorization": token_text(1)},
        {"authorization": f"Bearer {token_text(1)}x"},
        {"authorization": f"Bearer {token_text(9)}"},
        {"x-api-key": token_text(1)},
    ],
)
def test_what_is_no_token_is_refused(
    fleet: LocalFleet, http: HttpClient, headers: dict[str, str]
) -> None:
    """401, with how to do it right; a token in the address is none either."""
    give(fleet, "admin")
    for path in ("/tasks", f"/tasks?token={token_text(1)}", "/log"):
        answer = http.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith('Bearer realm="headstock"')


def test_two_tokens_in_one_request_are_none(fleet: LocalFleet, http: HttpClient) -> None:
    """A proxy and the service might each take another."""
    good = give(fleet, "admin")["authorization"]
    told = [("authorization", good), ("authorization", f"Bearer {token_text(2)}")]
    refused = http.get("/tasks", headers=told)

    assert "several Authorization headers" in problem(refused, 401)
    assert http.get("/tasks", headers=told[:1]).status_code == 200


def test_a_token_answers_for_its_tasks_alone(fleet: LocalFleet, http: HttpClient) -> None:
    """It may predict and read those, and sees of the service nothing else."""
    mine = give(fleet, "predict:pets*")
    picture = {"content": png_of(0), "headers": mine}
    refused = http.post("/predict/colours", **picture)
    unknown = http.post("/predict/pets-3", **picture)
    bundles = {t: fleet.view().tasks[t][-1].change.bundle for t in ("colours", "pets")}

    assert http.post("/predict/pets", **picture).json()["task"] == "pets"
    assert "lacks the scope predict:colours" in problem(refused, 403)
    assert "pets-2" in problem(unknown, 404)
    # Its name is close to that of a task which is none of its business.
    assert "closest" not in problem(http.post("/predict/petscolours", **picture), 404)
    assert "lacks" in problem(http.post("/predict?tasks=pets,colours", **picture), 403)
    assert [t["task"] for t in http.get("/tasks", headers=mine).json()["tasks"]] == [
        "pets",
        "pets-2",
    ]
    assert "lacks" in problem(http.get("/tasks/colours/versions", headers=mine), 403)
    assert http.get(f"/bundles/{bundles['pets']}", headers=mine).status_code == 200
    assert "was ever live" in problem(http.get(f"/bundles/{bundles['colours']}", headers=mine), 404)


def test_all_tasks_are_those_that_the_token_may_ask(fleet: LocalFleet, http: HttpClient) -> None:
    """`*` with a token for some answers some; an admin's answers all."""
    mine = give(fleet, "predict:pets*")

    def asked(headers: dict[str, str]) -> list[str]:
        answer = http.post("/predict?tasks=*", content=png_of(0), headers=headers)
        return [result["task"] for result in answer.json()["results"]]

    assert asked(mine) == ["pets", "pets-2"]
    assert asked(ADMIN) == ["colours", "pets", "pets-2"]
    none = http.post("/predict?tasks=*", content=png_of(0), headers=give(fleet, "metrics", seed=2))
    assert "lacks the scope predict:TASK" in problem(none, 403)


def test_a_pusher_pushes_its_task_and_rolls_nothing_back(
    fleet: LocalFleet, http: HttpClient, heads: Heads
) -> None:
    """The record, and with it the history, names the token that asked."""
    mine = give(fleet, "push:pets", name="ci")
    pushed = http.post("/tasks/pets/versions", content=heads(7, "pets").to_zip(), headers=mine)
    other = http.post("/tasks/colours/versions", content=heads(8).to_zip(), headers=mine)
    back = http.post("/tasks/pets/rollback", headers=mine)
    settings = http.request("PATCH", "/tasks/pets", json={"margin": 1}, headers=mine)
    undone = http.post(
        "/tasks/pets/rollback", headers=give(fleet, "rollback", seed=2, name="on-call")
    )
    history = http.get("/tasks/pets/versions", headers=mine).json()["versions"]

    assert pushed.status_code == 200, pushed.text
    assert "push:colours" in problem(other, 403)
    assert "rollback" in problem(back, 403)
    assert "admin" in problem(settings, 403)
    assert undone.json()["version"] == 3
    assert [version["who"] for version in history] == ["", "ci", "on-call"]


def test_a_token_opens_nothing_on_any_replica_once_its_revocation_has_returned(
    fleet: LocalFleet,
) -> None:
    """Made on one replica it opens the other at once, and revoked on one it opens none."""
    one, other = (HttpClient(fleet, f"replica-{n}") for n in (1, 2))
    for seed in range(1, 11):
        token, mine = token_for(seed, "predict:*"), bearer(seed)
        wanted = token.model_dump(mode="json", exclude={"is_revoked"})
        made = one.post("/tokens", json=wanted, headers=ADMIN)
        assert made.status_code == 200, made.text
        assert other.get("/tasks", headers=mine).status_code == 200
        revoked = one.request("DELETE", f"/tokens/{token.token_id}", headers=ADMIN)
        assert revoked.json()["state"] == "revoked"
        assert "is revoked" in problem(other.get("/tasks", headers=mine), 401)
        assert "is revoked" in problem(one.get("/tasks", headers=mine), 401)


def test_a_token_ends_by_itself(fleet: LocalFleet, http: HttpClient) -> None:
    """At its time, without a record that says so."""
    soon = datetime.now(UTC) + timedelta(seconds=0.5)
    mine = give(fleet, "admin", valid_until=soon)
    assert http.get("/tasks", headers=mine).status_code == 200
    while datetime.now(UTC) <= soon:
        pass

    assert "is expired" in problem(http.get("/tasks", headers=mine), 401)


def test_a_replica_that_starts_later_knows_the_tokens(fleet: LocalFleet) -> None:
    """They are in the log like all else."""
    good, bad = give(fleet, "admin"), give(fleet, "admin", seed=2)
    fleet.revoke_token(token_for(2, "admin").token_id)
    later = HttpClient(fleet, fleet.start_replica())

    assert later.get("/tasks", headers=good).status_code == 200
    assert later.get("/tasks", headers=bad).status_code == 401


def test_every_refusal_is_logged_without_the_secret(
    fleet: LocalFleet, http: HttpClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Who, what and why; whatever a stranger wrote cannot be a line of its own."""
    mine = give(fleet, "metrics")
    caplog.set_level(logging.WARNING, "serve.http.access")
    http.get("/tasks", headers=bearer(9))
    http.get("/log", headers=mine)
    http.get("/tasks/a%0aGOOD", headers=mine)
    lines = [record.getMessage() for record in caplog.records if "access" in record.name]

    assert len(lines) == 3
    assert lines[0] == "401 to GET '/tasks': \"The token is not one of this service's.\""
    assert lines[1] == "403 to GET '/log': 'The token token1 lacks the scope admin.'"
    assert "\n" not in "".join(lines)
    for seed in (1, 9):
        assert f"{seed:064x}" not in "".join(lines)


def test_the_canary_s_caller_is_the_token(
    fleet: LocalFleet, http: HttpClient, heads: Heads
) -> None:
    """One token stays with one side, whatever it says in the header; several are spread."""
    assert isinstance(fleet.push(heads(9, "pets"), share=0.5), Swapped)
    sides: list[set[str]] = []
    for seed in range(1, 21):
        mine = give(fleet, "predict:pets", seed=seed)
        sides.append(
            {
                http.post(
                    "/predict/pets",
                    content=png_of(picture),
                    headers={**mine, "x-headstock-caller": str(picture)},
                ).json()["bundle"]
                for picture in range(8)
            }
        )

    assert {len(seen) for seen in sides} == {1}
    assert len(set.union(*sides)) == 2


def test_on_loopback_nobody_is_asked(tmp_path: Path, trunk_folder: Path) -> None:
    """Decided by where the service listens; a token that is brought all the same does no harm."""
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        http = HttpClient(fleet, "replica-1")

        assert http.get("/log").status_code == 200
        assert http.get("/log", headers=bearer(1)).status_code == 200
        assert http.get("/tokens", headers=bearer(1)).json() == {
            "tokens_required": False,
            "tokens": [],
        }


@pytest.mark.parametrize(
    ("host", "access", "expected"),
    [
        ("127.0.0.1", "auto", 200),
        ("localhost", "auto", 200),
        ("::1", "auto", 200),
        ("0.0.0.0", "auto", 401),  # noqa: S104
        ("::", "auto", 401),
        ("10.1.2.3", "auto", 401),
        ("0.0.0.0", "off", 200),  # noqa: S104
        ("127.0.0.1", "on", 401),
    ],
)
def test_the_address_decides_whether_tokens_are_asked_for(
    tmp_path: Path, trunk_folder: Path, host: str, access: str, expected: int
) -> None:
    """Never the caller's: behind the proxy every caller is 127.0.0.1, as here."""
    settings = {"host": host, "access": access}
    with LocalFleet(tmp_path, trunk_folder, replicas=1, **settings) as fleet:
        assert HttpClient(fleet, "replica-1").get("/tasks").status_code == expected


def answer_of(http: HttpClient, **fields: object) -> httpx.Response:
    """The answer to a token with some fields changed."""
    wanted = token_for(1, "admin").model_dump(mode="json", exclude={"is_revoked"})
    return http.post("/tokens", json={**wanted, **fields}, headers=ADMIN)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"token_id": "x"}, "token_id is 'x'"),
        ({"sha256": "0" * 63}, "sha256 is"),
        ({"name": "a b"}, "name is 'a b'"),
        ({"scopes": []}, "scopes is"),
        ({"scopes": "admin"}, "scopes is 'admin'"),
        ({"scopes": ["root"]}, "scopes is 'root'"),
        ({"valid_until": "soon"}, "valid_until is 'soon'"),
        ({"valid_until": "2020-01-01T00:00:00Z"}, "it is past"),
        ({"rate_per_s": 0}, "rate_per_s is 0"),
        ({"rate_per_s": "fast"}, "rate_per_s is 'fast'"),
        ({"is_revoked": True}, "Field 'is_revoked' is unknown"),
        ({"message": 5}, "message is 5"),
    ],
)
def test_a_token_that_cannot_be_made_says_why(
    fleet: LocalFleet, http: HttpClient, fields: dict[str, object], reason: str
) -> None:
    """400, and nothing is written."""
    before = fleet.view().number

    assert reason in problem(answer_of(http, **fields), 400)
    assert fleet.view().number == before


def test_a_token_stays_as_it_was_made(http: HttpClient) -> None:
    """The same again is no error; another under its id or its name is one."""
    first = answer_of(http)
    again = answer_of(http)
    changed = answer_of(http, scopes=["metrics"])
    namesake = answer_of(http, token_id="f" * 12)

    assert first.json() == again.json()
    assert "is there already" in problem(changed, 409)
    assert "is that of token 000000000001" in problem(namesake, 409)
    assert "no token" in problem(http.request("DELETE", f"/tokens/{'e' * 12}", headers=ADMIN), 404)


# Commands


def test_the_way_of_a_token(
    fleet: LocalFleet, run: Run, monkeypatch: pytest.MonkeyPatch, heads: Heads, tmp_path: Path
) -> None:
    """Made by an admin, shown once, used, listed and revoked."""
    heads(7, "pets").write(tmp_path / "head")
    refused = run("status")
    monkeypatch.setenv("HEADSTOCK_TOKEN", "a" * 64)
    made = run(
        "tokens", "new", "ci", "--scope", "push:pets*", "--scope", "rollback", "--expires", "30d",
        "--rate", "90/m",
    )  # fmt: skip
    token = made.out.strip()
    monkeypatch.setenv("HEADSTOCK_TOKEN", token)
    pushed, history = run("push", f"{tmp_path}/head"), run("history", "pets", "--json")
    denied = run("tokens", "list")
    listed = run("tokens", "list", "--token", "a" * 64)
    log = run("history", "--token", "a" * 64)
    revoked = run("tokens", "revoke", "ci", "--token", "a" * 64)
    gone = run("status")

    assert (refused.code, "has no token" in refused.err) == (1, True)
    assert re.fullmatch(r"hs_[0-9a-f]{12}_[0-9a-f]{64}", token)
    assert "push:pets*, rollback until" in made.err
    assert "Shown only now" in made.err
    assert pushed.code == 0, pushed.err
    assert json.loads(history.out)[-1]["who"] == "ci"
    assert "lacks the scope admin" in denied.err
    (row,) = [line for line in listed.out.splitlines() if " ci " in line]
    assert all(part in row for part in (token[3:15], "valid", "push:pets*, rollback", "1.5/s"))
    assert "made token ci" in log.out
    assert revoked.out == f"ci ({token[3:15]}) is revoked on every replica\n"
    assert "is revoked" in gone.err
    told = "".join(done.out + done.err for done in (pushed, history, denied, listed, log, revoked))
    assert token[16:] not in told
    assert "aaaaaa" not in told
    (known,) = fleet.view().tokens.values()
    assert known.valid_until is not None
    assert timedelta(29.9) < known.valid_until - datetime.now(UTC) < timedelta(30)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("new", "a", "--scope", "admin", "--rate", "fast"), "--rate is 'fast'; expected a number"),
        (("new", "a", "--scope", "admin", "--expires", "soon"), "--expires is 'soon'; expected a"),
        (("new", "a", "--scope", "root"), "scopes is 'root'"),
        (("new", "a b", "--scope", "admin"), "name is 'a b'"),
        (("revoke", "nobody"), "No token is called 'nobody'; there are none."),
    ],
)
def test_a_command_about_tokens_that_cannot_go_on_says_why_in_one_line(
    fleet: LocalFleet, run: Run, arguments: tuple[str, ...], reason: str
) -> None:
    """Exit code 1, and nothing is made."""
    done = run("tokens", *arguments, "--token", "a" * 64)

    assert (done.code, done.out) == (1, "")
    assert reason in done.err
    assert done.err.count("\n") == 1
    assert fleet.view().tokens == {}


def test_help_shows_no_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the variable is the default of the option."""
    monkeypatch.setenv("HEADSTOCK_TOKEN", "b" * 64)

    assert "bbbbbb" not in run("status", "--help").out


def test_standard_clients_see_the_models_that_their_token_is_for(
    fleet: LocalFleet, http: HttpClient
) -> None:
    """In the index and the statistics of all; the models of a task are its own."""
    mine = give(fleet, "predict:pets*", "push:pets")
    body = image(png_of(0))
    found = {
        name: http.post(f"/v2/models/{name}/infer", json=body, headers=mine).status_code
        for name in ("pets", "pets-2", "colours", "colours.pixels")
    }
    index = http.post("/v2/repository/index", headers=mine).json()
    unload = http.post("/v2/repository/models/pets-2/unload", headers=mine)
    assert http.post("/v2/repository/models/pets/unload", headers=mine).status_code == 200
    http.post("/predict/colours", content=png_of(0), headers=ADMIN)

    def counted(headers: dict[str, str]) -> set[str]:
        stats = http.get("/v2/models/stats", headers=headers).json()["model_stats"]
        return {entry["name"] for entry in stats}

    until(lambda: counted(ADMIN) == {"pets", "pets-2", "colours"})
    assert counted(mine) == {"pets", "pets-2"}
    assert found == {"pets": 200, "pets-2": 200, "colours": 403, "colours.pixels": 403}
    assert {entry["name"].partition(".")[0] for entry in index} == {"pets", "pets-2"}
    assert "lacks the scope push:pets-2" in error(unload, 403)
    assert fleet.view().tasks["pets"][-1].who == token_for(1, "predict:a").name


INFER = "/v2/models/pets/infer"


def test_tokens_that_open_nothing_reach_no_model(fleet: LocalFleet, http: HttpClient) -> None:
    """None, one that nobody made, one of another form, an expired one, one for another task."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    expired = give(fleet, "predict:pets", seed=1, valid_until=past)
    narrow = give(fleet, "predict:colours", seed=2)
    batcher, asked = fleet.replicas["replica-1"].batcher, list[object]()
    expect = batcher.expect

    def note(*given: Any) -> None:
        asked.append(given)
        expect(*given)

    batcher.expect = note  # pyrefly: ignore
    cases: list[tuple[dict[str, str], int, str]] = [
        ({}, 401, "has no token"),
        (bearer(3), 401, ""),
        ({"authorization": "Bearer x"}, 401, ""),
        ({"authorization": "Basic YTpi"}, 401, ""),
        (expired, 401, "is expired"),
        (narrow, 403, "lacks the scope predict:pets"),
    ]
    for headers, status, why in cases:
        answer = http.post(INFER, json=image(png_of(0)), headers=headers)
        assert why in error(answer, status)
        assert answer.headers["www-authenticate"].startswith('Bearer realm="headstock"')

    assert asked == []
    assert http.post(INFER, json=image(png_of(0)), headers=ADMIN).status_code == 200
    assert len(asked) == 1


@pytest.mark.parametrize("model", ["pets", "pets.pixels", "pets.features"])
def test_a_tasks_scope_opens_all_its_models(
    fleet: LocalFleet, http: HttpClient, model: str
) -> None:
    """To ask them takes the right to predict; to read of them is not enough."""
    predicts = give(fleet, "predict:pets", seed=1)
    pushes = give(fleet, "push:pets", seed=2)
    path = f"/v2/models/{model}"

    assert http.get(path, headers=predicts).status_code == 200
    assert http.get(path, headers=pushes).status_code == 200
    assert "body is empty" in error(http.post(f"{path}/infer", headers=predicts), 400)
    refused = error(http.post(f"{path}/infer", headers=pushes), 403)
    assert "lacks the scope predict:pets." in refused


def test_a_tokens_rate_is_one_for_both_surfaces(fleet: LocalFleet, http: HttpClient) -> None:
    """429 with whole seconds, in the protocol's form."""
    mine = give(fleet, "predict:pets", rate_per_s=1)
    answers = [http.post(INFER, json=image(png_of(0)), headers=mine) for _ in range(20)]
    refused = next(answer for answer in answers if answer.status_code != 200)

    assert "1 request" in error(refused, 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert http.post("/predict/pets", content=png_of(0), headers=mine).status_code == 429
