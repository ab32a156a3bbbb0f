"""A service whose head log is in a bucket and that trusts a key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.bundle import Bundle
from export.keys import load_private_key
from export.sign import key_id_of, sign
from tests.end_to_end.callers import png
from tests.end_to_end.program import Program, headstock
from tests.serve.conftest import BundleMaker
from tests.serve.oracle import Heads, expected_scores, some_picture
from tests.serve.s3 import S3Server, new_url
from tests.serve.signers import key_of

pytestmark = pytest.mark.cluster

TASK = "kept"


@pytest.fixture(scope="module")
def restarted(
    trunk_folder: Path, make_bundle: BundleMaker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Program]:
    """The second service on a bucket; to the first one a head was pushed, and it ended."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables().items():
            patch.setenv(name, value)
        url = new_url()
        with Program(tmp_path_factory.mktemp("first"), trunk_folder, store=url) as first:
            with first.client() as client:
                client.push(make_bundle(TASK, seed=0))
            assert_answers(first, seed=0, version=1)
        with Program(tmp_path_factory.mktemp("second"), trunk_folder, store=url) as second:
            yield second


def assert_answers(service: Program, *, seed: int, version: int) -> None:
    """By the head of that seed, as numpy computes it."""
    with service.client() as client:
        prediction = client.predict(TASK, png(some_picture(0)))
    assert prediction.version == version
    expected = pytest.approx(expected_scores(some_picture(0), seed), abs=1e-5)
    assert list(prediction.scores.values()) == expected


def test_what_went_live_from_a_bucket_is_live_after_a_restart(restarted: Program) -> None:
    """Nothing but the bucket is left of the first service."""
    assert_answers(restarted, seed=0, version=1)


def refused_gate(service: Program, bundle: Bundle) -> tuple[int, str]:
    """Status of a push over HTTP, and the gate that said no."""
    answer = httpx.post(
        f"{service.url}/tasks/{TASK}/versions",
        content=bundle.to_zip(),
        headers={"content-type": "application/zip"},
        timeout=60,
    )
    return answer.status_code, answer.json()["gates"][-1]["gate"]


def test_a_service_that_trusts_a_key_takes_what_it_signed_and_nothing_else(
    restarted: Program, heads: Heads, tmp_path: Path
) -> None:
    """Pushed by commands, as a pipeline would; refused over HTTP with the gate that refused."""

    def run(*arguments: object) -> str:
        done = headstock(*arguments, server=restarted.url)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("keys", "new", "ci", "--out", tmp_path)
    run("keys", "trust", tmp_path / "ci.pub")
    heads(1, TASK).write(tmp_path / "bundle")
    pushed = json.loads(run("push", tmp_path / "bundle", "--key", tmp_path / "ci.key", "--json"))
    key = load_private_key(tmp_path / "ci.key", lambda: "")
    signed = sign(heads(2, TASK), key, task=TASK, signed_at=datetime.now(UTC))
    strangers = sign(heads(2, TASK), key_of(1), task=TASK, signed_at=datetime.now(UTC))
    assert strangers.signature is not None
    impostors = replace(
        strangers,
        signature=strangers.signature.replace(_id(key_of(1)).encode(), _id(key).encode()),
    )
    transplanted = replace(heads(3, TASK), signature=signed.signature)

    assert (pushed["version"], pushed["bundle"]) == (2, heads(1, TASK).digest)
    for bundle in (heads(2, TASK), strangers, impostors, transplanted):
        assert refused_gate(restarted, bundle) == (422, "signature")
    assert_answers(restarted, seed=1, version=2)


def _id(key: Ed25519PrivateKey) -> str:
    return key_id_of(key.public_key().public_bytes_raw())
