"""Malformed requests where tokens are asked for: who has none gets no answer, and none is ours.

What `benchmarks/fuzz_http.py` sends to an open service, each with a token that is valid, expired,
revoked, for another task, unknown, damaged, doubled or missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.fuzz_cases import Sent, changes, damaged, inferences, predictions, reads
from serve.jobs import Job
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.holders import token_for, token_text
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of
from tests.serve.test_http_access import OPEN

NUM_CASES = 600
ALONE = {"inference-header-content-length": "0"}
# Nothing but a token keeps these from an answer.
GOOD = st.sampled_from(
    [
        Sent("POST", "/v2/models/pets/infer", ALONE, png_of(0)),
        Sent("POST", "/v2/models/pets/versions/1/infer", ALONE, png_of(0)),
        Sent("POST", "/v2/models/colours.features/infer", ALONE, bytes(12)),
        Sent("POST", "/predict/pets", {}, png_of(0)),
        Sent("POST", "/predict?tasks=*", {}, png_of(0)),
    ]
)
VALID, NARROW, EXPIRED, REVOKED, UNKNOWN = (token_text(number).encode() for number in range(1, 6))
TASKS_OF = {"valid": {"pets", "colours"}, "narrow": {"colours"}, "none": set[str]()}
CUT = damaged(st.sampled_from([b"Bearer " + VALID, VALID, b"Bearer " + VALID[:-1]]))
NO_TOKENS = st.one_of(
    st.sampled_from([b"Bearer " + token for token in (EXPIRED, REVOKED, UNKNOWN)]),
    st.sampled_from(
        [b"", b"Bearer", b"Bearer ", b"Basic YTpi", b"Bearer \xff\xfe", b"Bearer \x00"]
    ),
    CUT.filter(lambda value: VALID not in value),
    st.just(b"Bearer " + VALID * 2),
    st.just(b"Digest " + VALID),
)


@dataclass(frozen=True)
class Asked:
    """A request, its Authorization headers, and what those are worth."""

    sent: Sent
    authorization: tuple[bytes, ...]
    worth: str


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    """What others send to an open service, by somebody."""
    sent = draw(st.one_of(GOOD, inferences(), predictions(), changes(), reads()))
    one = draw(NO_TOKENS)
    valid, narrow = b"Bearer " + VALID, b"bearer  " + NARROW
    authorization, worth = draw(
        st.sampled_from(
            [
                ((valid,), "valid"),
                ((narrow,), "narrow"),
                ((), "none"),
                ((one,), "none"),
                ((valid, valid), "none"),
                ((one, valid), "none"),
            ]
        )
    )
    return Asked(sent, authorization, worth)


@pytest.fixture(scope="module")
def cases() -> list[Asked]:
    """The same each time.

    They are made before any fleet runs: checked annotations draw random numbers in its threads, and
    hypothesis watches for that.
    """
    made: list[Asked] = []

    @seed(0)
    @settings(
        max_examples=NUM_CASES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(asked())
    def make(case: Asked) -> None:
        made.append(case)

    make()
    return made


@pytest.fixture
def fleet(tmp_path: Path, trunk_folder: Path, heads: Heads) -> Iterator[LocalFleet]:
    """One replica that asks for tokens, two tasks, and the tokens above."""
    limits = {"max_body_bytes": 200_000, "max_bundle_bytes": 200_000}
    access = {"access": "on", "admin_token": "a" * 64}
    with LocalFleet(tmp_path, trunk_folder, replicas=1, **access, **limits) as fleet:
        for number, task in enumerate(("colours", "pets")):
            fleet.must_push(heads(number, task))
        past = datetime.now(UTC) - timedelta(seconds=1)
        fleet.issue(token_for(1, "predict:pets", "predict:colours"))
        fleet.issue(token_for(2, "predict:colours"))
        fleet.issue(token_for(3, "admin", valid_until=past))
        fleet.issue(token_for(4, "admin"))
        fleet.revoke_token(token_for(4, "admin").token_id)
        yield fleet


def test_no_request_without_a_token_for_it_reaches_a_model(
    cases: list[Asked], fleet: LocalFleet
) -> None:
    """Nor changes anything; no answer is a failure of ours, whatever it carries."""
    client, batcher = HttpClient(fleet, "replica-1"), fleet.replicas["replica-1"].batcher
    seen, reached, before = Counter[tuple[str, int]](), list[Job](), fleet.view().number
    expect = batcher.expect

    def note(job: Job, num_inputs: int) -> None:
        reached.append(job)
        expect(job, num_inputs)

    batcher.expect = note  # pyrefly: ignore

    for case in cases:
        sent, num_before = case.sent, len(reached)
        others = [(n, v.encode("latin-1")) for n, v in sent.headers.items() if n != "authorization"]
        headers = [*others, *(("authorization", value) for value in case.authorization)]
        response = client.request(sent.method, sent.path, content=sent.body, headers=headers)
        status, path = response.status_code, response.request.url.path
        seen[case.worth, status] += 1
        assert status < 500 or (status == 503 and "retry-after" in response.headers), response.text
        for job in reached[num_before:]:
            tasks = batcher.snapshot.heads if job.tasks is None else job.tasks
            assert {task for task in tasks if job.may_ask(task)} <= TASKS_OF[case.worth], case
        if case.worth == "none" and path not in OPEN:
            assert status in {401, 404, 405}, case
        if status >= 400 and path.startswith("/v2/") and response.content:
            assert list(response.json()) == ["error"], response.text

    assert fleet.view().number == before
    assert reached
    assert {("valid", 200), ("narrow", 403), ("none", 401)} <= seen.keys(), seen
    assert {status for worth, status in seen if worth == "valid"} >= {200, 400, 403, 404}
