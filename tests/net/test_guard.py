"""Addresses that nothing is sent to, whatever a name stands for."""

import socket

import pytest

from codex_proxy.addresses import why_not
from codex_proxy.config import TRANSPORTS, Live, Settings
from codex_proxy.net import NetError, NetKind, Outbound
from codex_proxy.net.connections import AddrInfo


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("169.254.169.254", "link-local"),
        ("169.254.0.1", "link-local"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("::a9fe:a9fe", "link-local"),
        ("64:ff9b::a9fe:a9fe", "link-local"),
        ("64:ff9b:1::a9fe:a9fe", "link-local"),
        ("::ffff:0:a9fe:a9fe", "link-local"),
        ("2002:a9fe:a9fe::1", "link-local"),
        ("100.100.100.200", "metadata"),
        ("168.63.129.16", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("Metadata.Google.Internal.", "metadata"),
        ("0.0.0.0", "anybody"),
        ("::", "anybody"),
        ("224.0.0.1", "many"),
        ("255.255.255.255", "many"),
        ("127.0.0.1", ""),
        ("::1", ""),
        ("10.0.0.1", ""),
        ("192.168.1.1", ""),
        ("fd00::1", ""),
        ("8.8.8.8", ""),
        ("example.com", ""),
        ("169.254.169.254.example.com", ""),
        ("", ""),
    ],
)
def test_where_nothing_is_sent(host: str, words: str) -> None:
    found = why_not(host)
    assert words in found
    assert bool(found) is bool(words)


def info(address: str, port: int) -> AddrInfo:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))


async def test_a_name_that_stands_for_such_an_address_is_none_to_call() -> None:
    outbound = Outbound(Live(Settings()))

    async def resolve(host: str, port: int) -> list[AddrInfo]:
        return [info("169.254.169.254", port), info("100.100.100.200", port)]

    outbound.native.resolve = resolve
    with pytest.raises(
        NetError, match=r"h\.test is a link-local address, to which nothing is sent"
    ) as caught:
        await outbound.fetch("GET", "http://h.test/v1/models", headers={}, is_guarded=True, timeout=2)
    assert caught.value.kind is NetKind.CONNECT
    await outbound.aclose()


async def test_the_other_addresses_of_a_name_are_called(unused_tcp_port: int) -> None:
    outbound = Outbound(Live(Settings()))

    async def resolve(host: str, port: int) -> list[AddrInfo]:
        return [info("169.254.169.254", port), info("127.0.0.1", port)]

    outbound.native.resolve = resolve
    # Nobody listens there: that it was called at all is what counts.
    with pytest.raises(NetError, match="connect failed"):
        await outbound.fetch(
            "GET", f"http://h.test:{unused_tcp_port}/", headers={}, is_guarded=True, timeout=2
        )
    await outbound.aclose()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_numbers_are_looked_at_however_they_are_written(transport: str) -> None:
    outbound = Outbound(Live(Settings(upstream_transport=transport)))
    for host in ("169.254.169.254", "[::ffff:a9fe:a9fe]"):
        with pytest.raises(NetError, match="to which nothing is sent"):
            await outbound.fetch("GET", f"http://{host}/", headers={}, is_guarded=True, timeout=2)
    await outbound.aclose()
