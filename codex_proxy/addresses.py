"""Addresses as texts, and those that nothing is sent to because a setting, or a name, says so.

Clouds tell a machine its own secrets under link-local addresses and a few others. Whoever can have the proxy
call an address of their choice would be told them too. Everything else may be called: upstreams live on
loopback and in private networks.
"""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = frozenset(
    map(
        ipaddress.ip_address,
        # Azure, Alibaba, Oracle, AWS over IPv6; all others use a link-local one.
        ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"),
    )
)
_METADATA_NAMES = frozenset({"metadata", "metadata.google.internal", "instance-data", "metadata.goog"})

# An IPv4 address behind a translator: everywhere, in one network, and as SIIT writes it.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96")))
_COMPATIBLE = ipaddress.ip_network("::/96")


def read_address(text: str) -> Address | None:
    """Return the address in *text*, an IPv4 one where it only stands behind IPv6; None when there is none.

    A scope names an interface, and does not change what the address is.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def why_not(host: str) -> str:
    """Say why nothing may be sent to *host*, a name or an address; empty when it may, as far as one can tell from it."""
    name = host.lower().removesuffix(".")
    if name in _METADATA_NAMES:
        return "a cloud's metadata service"
    try:
        # A scope names an interface, and does not change what the address is.
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return ""
    return why_not_address(address)


def why_not_address(address: Address) -> str:
    """Say why nothing may be sent to *address*; empty when it may."""
    inner = _inside(address)
    if inner is not None:
        return why_not_address(inner)
    if address in _METADATA:
        return "a cloud's metadata service"
    if address.is_link_local:
        return "a link-local address"
    if address.is_unspecified:
        return "no address of anybody"
    if address.is_multicast or str(address) == "255.255.255.255":
        return "an address of many"
    return ""


def _inside(address: Address) -> ipaddress.IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for; None when it stands for itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in one for one in _TRANSLATED) or (address in _COMPATIBLE and int(address) > 0xFFFF):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return None
