"""Who can reach the service's insides: nobody from outside, no other user of the machine."""

from __future__ import annotations

import ipaddress
import socket
import stat
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.program import Program, listening

pytestmark = pytest.mark.cluster

NOWHERE = ("192.0.2.1", 9)  # reserved for documentation; nothing is sent there


@pytest.fixture
def own_address() -> str:
    """An address of this machine that others could reach it by."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(NOWHERE)  # of a datagram socket: picks the way, sends nothing
        except OSError:
            pytest.skip("this machine has no network interface but loopback")
        address = probe.getsockname()[0]
    if ipaddress.ip_address(address).is_loopback:
        pytest.skip("this machine has no network interface but loopback")
    return address


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's alone, also as IPv6 writes an IPv4 address."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (mapped or parsed).is_loopback


def test_every_port_is_bound_to_loopback(service: Program) -> None:
    """The front door's, HAProxy's, and each of Ray's own, in every process of the service."""
    ports = {
        (process.name(), address, port)
        for process in service.tree()
        for address, port in listening(process)
    }

    assert {entry for entry in ports if not is_loopback(entry[1])} == set()
    assert service.port in {port for _, _, port in ports}
    # GCS, raylet, agents, workers, two replicas with two ports each, HAProxy's three.
    assert len(ports) >= 15


def test_no_port_answers_on_an_address_that_others_can_reach(
    service: Program, own_address: str
) -> None:
    """Tried by connecting, whatever the tables say."""
    ports = {port for process in service.tree() for _, port in listening(process)}
    reachable = []
    for port in ports:
        with socket.socket() as caller:
            caller.settimeout(2)
            if caller.connect_ex((own_address, port)) == 0:
                reachable.append(port)

    assert len(ports) >= 15
    assert reachable == []


def test_its_sockets_lie_in_a_folder_of_its_user_alone(service: Program) -> None:
    """HAProxy's admin socket and Ray's object store: whoever opens them commands the service."""
    sockets = {
        Path(connection.laddr)
        for process in service.tree()
        for connection in process.net_connections("unix")
        if isinstance(connection.laddr, str) and connection.laddr.startswith("/")
    }

    assert {path.name.partition(".")[0] for path in sockets} >= {"admin", "raylet", "plasma_store"}
    assert {path for path in sockets if not is_private(path)} == set()


def is_private(path: Path) -> bool:
    """Whether a folder above the path lets nobody in but its owner."""
    user = psutil.Process().uids().real
    return any(
        folder.exists()
        and folder.stat().st_uid == user
        and stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
        for folder in path.parents
    )
