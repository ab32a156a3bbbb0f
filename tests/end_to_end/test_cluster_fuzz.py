"""Damaged requests through the front door, where HAProxy and Ray's own server see them first."""

from __future__ import annotations

from contextlib import closing

import pytest

from benchmarks.fuzz_http import Fuzzer
from benchmarks.fuzz_service import TASKS
from tests.end_to_end.program import Program
from tests.serve.oracle import Heads

pytestmark = pytest.mark.cluster

NUM_CASES = 600


def test_no_malformed_request_harms_the_service_behind_its_proxy(
    service: Program, heads: Heads
) -> None:
    """Each gets an answer that is listed, and both replicas go on."""
    with service.client() as client:
        for task in TASKS:
            client.push(heads(0, task))
    before = {replica.pid for replica in service.replicas()}
    with closing(Fuzzer(service.url)) as fuzzer:
        fuzzer.run(NUM_CASES, first_seed=11)

    assert not fuzzer.tally.problems
    assert service.is_whole()
    assert {replica.pid for replica in service.replicas()} == before
