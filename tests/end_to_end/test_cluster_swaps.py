"""Swaps of a running service: nothing dropped, one order for all, one change a key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from serve.client import ClientError
from tests.end_to_end.callers import Callers
from tests.end_to_end.program import Program
from tests.serve.oracle import Heads

pytestmark = pytest.mark.cluster


def test_twenty_swaps_under_load_drop_nothing_and_are_seen_in_one_order(
    service: Program, heads: Heads
) -> None:
    """Eight clients on two replicas, alone and in fan-out, while heads are pushed."""
    with service.client() as client:
        client.push(heads(0, "swapped"))
        client.push(heads(0, "beside"))
    questions = (("swapped",), ("beside",), ("swapped", "beside"), ("beside", "swapped"))
    with Callers(service, heads, questions) as callers:
        callers.wait_for(50)
        for seed in range(1, 21):
            callers.push(seed, "swapped")
            callers.wait_for(10)
            if seed % 5 == 0:
                callers.push(seed, "beside")
        callers.wait_for(50)

    assert callers.judge() == []
    assert {s.version("swapped") for s in callers.seen if "swapped" in s.tasks} == {*range(1, 22)}


def test_pushes_at_once_make_each_one_version(service: Program, heads: Heads) -> None:
    """Whoever is first, both are ordered: no version is skipped, repeated or lost."""
    bundles = [heads(seed, "raced") for seed in range(4)]
    with ThreadPoolExecutor(4) as pool, service.client() as client:
        pushes = [pool.submit(client.push, bundle) for bundle in bundles]
        versions = [push.result()["version"] for push in pushes]

    history = service.view().tasks["raced"]
    assert sorted(versions) == [1, 2, 3, 4]
    assert {v.change.version: v.change.bundle for v in history} == {
        version: bundle.digest for version, bundle in zip(versions, bundles, strict=True)
    }


def test_one_key_makes_one_change_however_often_it_is_sent(service: Program, heads: Heads) -> None:
    """At once or later, the same push with the same key gives the same version."""
    bundle = heads(0, "keyed")
    with ThreadPoolExecutor(4) as pool, service.client() as client:
        pushes = [pool.submit(client.push, bundle, key="one key") for _ in range(4)]
        answers = [push.result() for push in pushes]
        answers.append(client.push(bundle, key="one key"))

    assert [answer["version"] for answer in answers] == [1] * 5
    assert [answer["bundle"] for answer in answers] == [bundle.digest] * 5
    assert len(service.view().tasks["keyed"]) == 1


def test_a_key_that_made_a_change_makes_no_other(service: Program, heads: Heads) -> None:
    """Reused for another bundle, it is refused as a conflict, and nothing changes."""
    with service.client() as client:
        client.push(heads(0, "reused"), key="another key")

        with pytest.raises(ClientError, match="use a new key") as refused:
            client.push(heads(1, "reused"), key="another key")
        assert refused.value.status == 409
    assert len(service.view().tasks["reused"]) == 1
