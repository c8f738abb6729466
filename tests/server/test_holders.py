"""Keys of the ledger at the door: who holds one, from where, and that no holder is an owner."""

from dataclasses import replace
from ipaddress import ip_network

import pytest
from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from codex_proxy.clock import ManualClock
from codex_proxy.config import ApiKey, Live, Settings
from codex_proxy.errors import KeyRefused, TooManyGuesses
from codex_proxy.ledger.directory import Directory
from codex_proxy.ledger.keys import digest_of, is_well_formed, make_key
from codex_proxy.ledger.model import NO_LIMITS, Key, Limits, User
from codex_proxy.server.access import Access, Level, address_of
from codex_proxy.server.holders import KeyHolders, is_within
from codex_proxy.trace import LOCAL

NOW = 1_800_000_000.0
TEXT = make_key(bytes(range(32)))
OTHER = make_key(bytes(range(1, 33)))
USER = User("user_1", "ada", "active", True, 0, 0, NO_LIMITS, 0)
KEY = Key("key_1", "user_1", "laptop", digest_of(TEXT), "sk-...", "active", None, NO_LIMITS, 0)
LOOPBACK = Settings(listen="127.0.0.1:8080")


def ask(*headers: tuple[str, str], remote: str = "127.0.0.1") -> web.Request:
    found = CIMultiDict([("Host", "127.0.0.1:8080"), *headers])
    request = make_mocked_request("POST", "/v1/responses", headers=found, payload=EMPTY_PAYLOAD)
    return request.clone(remote=remote)


def bearer(text: str) -> tuple[str, str]:
    return ("Authorization", f"Bearer {text}")


def door(*keys: Key, user: User = USER, settings: Settings = LOOPBACK) -> Access:
    clock = ManualClock(NOW)
    directory = Directory(clock.now)
    directory.load([user], [(key, None, None) for key in keys])
    access = Access(Live(settings))
    access.holders = KeyHolders(directory, clock)
    return access


@pytest.mark.parametrize("header", [bearer(TEXT), ("x-api-key", TEXT)])
def test_a_key_of_the_ledger_names_its_caller(header: tuple[str, str]) -> None:
    caller = door(KEY).admit(ask(header), Level.KEYED)
    assert (caller.id, caller.name) == ("key_1", "laptop")


def test_among_several_keys_the_one_that_is_ours_counts() -> None:
    caller = door(KEY).resolve(ask(bearer("eyJ.of.somebody"), ("x-api-key", TEXT)))
    assert caller.id == "key_1"


@pytest.mark.parametrize(
    ("key", "user", "code"),
    [
        (replace(KEY, status="revoked"), USER, "key_revoked"),
        (replace(KEY, expires=int(NOW * 1000)), USER, "key_expired"),
        (KEY, replace(USER, status="suspended"), "user_suspended"),
        (replace(KEY, limits=Limits(networks=("10.0.0.0/8",))), USER, "address_not_allowed"),
        (KEY, replace(USER, limits=Limits(networks=("::1/128",))), "address_not_allowed"),
    ],
)
def test_a_key_that_may_not_be_used_is_refused_and_not_taken_for_nobody(
    key: Key, user: User, code: str
) -> None:
    with pytest.raises(KeyRefused) as caught:
        door(key, user=user).resolve(ask(bearer(TEXT)))
    assert caught.value.code == code
    assert TEXT not in caught.value.message


def test_a_key_that_has_not_yet_expired_still_works() -> None:
    assert door(replace(KEY, expires=int(NOW * 1000) + 1)).resolve(ask(bearer(TEXT))).id == "key_1"


def test_once_there_are_keys_one_is_needed() -> None:
    assert door().resolve(ask()) == LOCAL
    assert door().resolve(ask(bearer("anything"))) == LOCAL
    for headers in ((), (bearer("anything"),), (bearer(OTHER),)):
        with pytest.raises(KeyRefused):
            door(KEY).resolve(ask(*headers))


def test_a_key_of_another_ledger_is_never_taken_for_nobody() -> None:
    with pytest.raises(KeyRefused):
        door().resolve(ask(bearer(OTHER)))
    # The owner may have decided that no key is needed at all.
    settings = Settings(listen=":8080", auth="none")
    assert door(KEY, settings=settings).resolve(ask()) == LOCAL
    with pytest.raises(KeyRefused):
        door(KEY, settings=settings).resolve(ask(bearer(OTHER)))


def test_the_configurations_keys_work_beside_the_ledgers() -> None:
    access = door(KEY, settings=replace(LOOPBACK, api_keys=(ApiKey.of("alice", "key-of-alice"),)))
    assert access.resolve(ask(bearer("key-of-alice"))).name == "alice"
    assert access.resolve(ask(bearer(TEXT))).name == "laptop"


@pytest.mark.parametrize("level", [Level.OWNER, Level.METRICS, Level.ADMIN])
@pytest.mark.parametrize(
    "settings",
    [
        LOOPBACK,
        replace(LOOPBACK, api_keys=(ApiKey.of("alice", "key-of-alice"),)),
        replace(LOOPBACK, admin_key=ApiKey.of("admin", "the-key-of-the-admin")),
        Settings(listen=":8080", auth="none"),
    ],
)
def test_no_holder_is_an_owner(level: Level, settings: Settings) -> None:
    if level is Level.ADMIN and settings.admin_key is None:
        return
    with pytest.raises(KeyRefused):
        door(KEY, settings=settings).admit(ask(bearer(TEXT)), level)


def test_a_good_key_of_the_ledger_is_no_guess_at_the_owners() -> None:
    """It is whose it is; one that is good no more, or was never made, is a wrong key like any other."""
    settings = replace(LOOPBACK, admin_key=ApiKey.of("admin", "the-key-of-the-admin"))
    revoked = replace(KEY, id="key_2", digest=digest_of(OTHER), status="revoked")
    access = door(KEY, revoked, settings=settings)

    def offer(text: str) -> None:
        with pytest.raises(KeyRefused):
            access.admit(ask(bearer(text)), Level.OWNER)

    for _ in range(20):
        offer(TEXT)
    assert not access.throttle._failures
    offer(OTHER)
    for number in range(4):
        offer(make_key(bytes(range(number + 2, number + 34))))
    with pytest.raises(TooManyGuesses):
        access.admit(ask(bearer(TEXT)), Level.OWNER)
    # Where clients ask nobody is kept out.
    assert access.admit(ask(bearer(TEXT)), Level.KEYED).id == "key_1"


@pytest.mark.parametrize(
    ("address", "is_in"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("11.0.0.1", False),
        ("fe80::1%eth0", True),
        ("2001:db8::1", False),
        ("", False),
        (None, False),
        ("unknown", False),
    ],
)
def test_an_address_is_looked_for_in_networks(address: str | None, is_in: bool) -> None:
    assert is_within(address, ("10.0.0.0/8", "fe80::/64")) is is_in


@pytest.mark.parametrize(
    ("remote", "passed", "found"),
    [
        ("10.0.0.1", ["203.0.113.9"], "203.0.113.9"),
        # What stands before the first relay that is not ours was written by whoever asked.
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", ["203.0.113.9, 10.0.0.2"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1", "203.0.113.9"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["203.0.113.9:50123"], "203.0.113.9"),
        ("10.0.0.1", ["1.1.1.1, 203.0.113.9:1, 10.0.0.2:65535"], "203.0.113.9"),
        ("10.0.0.1", ["[2001:db8::1]:443"], "2001:db8::1"),
        ("10.0.0.1", ["[2001:db8::1]"], "2001:db8::1"),
        ("10.0.0.1", ["2001:db8::1"], "2001:db8::1"),
        # Nobody's address, and so in no network.
        ("10.0.0.1", ["203.0.113.9,"], ""),
        ("10.0.0.1", ["[]:1"], ""),
        ("10.0.0.1", ["unknown"], "unknown"),
        ("10.0.0.1", ["203.0.113.9, ::ffff:10.0.0.2"], "203.0.113.9"),
        ("198.51.100.1", ["203.0.113.9"], "198.51.100.1"),
    ],
)
def test_a_relay_is_believed_when_it_is_one_of_ours(remote: str, passed: list[str], found: str) -> None:
    loaded = replace(LOOPBACK, trusted_proxies=(ip_network("10.0.0.0/8"),))
    request = ask(*(("X-Forwarded-For", line) for line in passed), remote=remote)
    assert address_of(request, loaded) == found
    assert address_of(request, LOOPBACK) == remote


def test_a_mistyped_key_is_known_as_one() -> None:
    assert is_well_formed(TEXT)
    assert not is_well_formed(TEXT[:-1] + ("0" if TEXT[-1] != "0" else "1"))
    assert not is_well_formed(TEXT[:10] + ("0" if TEXT[10] != "0" else "1") + TEXT[11:])
    assert not is_well_formed("sk-test123")
