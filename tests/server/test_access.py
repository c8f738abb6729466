"""Who may ask: keys, forged requests, and the key that is made when nobody set one."""

import hmac
import io
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from codex_proxy.clock import ManualClock
from codex_proxy.config import ApiKey, Live, Settings
from codex_proxy.errors import ConfigError, KeyRefused, RequestError, TooManyGuesses
from codex_proxy.server.access import Access, Level
from codex_proxy.server.keyfile import announce, ensure_client_key, needs_key, read_client_key
from codex_proxy.throttle import Throttle
from codex_proxy.trace import LOCAL

LOOPBACK = Settings(listen="127.0.0.1:8080")
ALICE, BOB = ApiKey.of("alice", "key-of-alice"), ApiKey.of("bob", "key-of-bob")
KEYED = Settings(listen=":8080", api_keys=(ALICE, BOB))


def ask(method: str = "GET", *headers: tuple[str, str], body: bool = False) -> web.Request:
    """Return a request; Host is ours unless given."""
    found = CIMultiDict(headers)
    if "Host" not in found:
        found["Host"] = "127.0.0.1:8080"
    if found["Host"] == "":
        del found["Host"]
    # The server hands over this very object for a request without a body.
    payload = mock.Mock() if body else EMPTY_PAYLOAD
    return make_mocked_request(method, "/refresh", headers=found, payload=payload)


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ([("Authorization", "Bearer key-of-alice")], "alice"),
        ([("authorization", "bEaReR   key-of-bob ")], "bob"),
        ([("x-api-key", "key-of-bob")], "bob"),
        ([("X-Api-Key", " key-of-alice")], "alice"),
        ([("Authorization", "Bearer eyJ.other.login"), ("x-api-key", "key-of-alice")], "alice"),
        ([("Authorization", "Bearer key-of-alice"), ("x-api-key", "nonsense")], "alice"),
        ([("Authorization", "Bearer nonsense"), ("Authorization", "Bearer key-of-bob")], "bob"),
    ],
)
def test_a_known_key_names_its_caller(headers: list[tuple[str, str]], name: str) -> None:
    caller = Access(Live(KEYED)).resolve(ask("POST", *headers))
    assert caller.name == name
    digest = (ALICE if name == "alice" else BOB).digest
    assert caller.id == f"key-{digest.hex()[:8]}"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer ")],
        [("Authorization", "Bearer")],
        [("Authorization", "")],
        [("Authorization", "key-of-alice")],
        [("Authorization", "Basic key-of-alice")],
        [("Authorization", "Bearer key-of-alic")],
        [("Authorization", "Bearer key-of-alice key-of-bob")],
        [("Authorization", "Bearer Key-Of-Alice")],
        [("x-api-key", "")],
        [("api-key", "key-of-alice")],
    ],
)
def test_anything_else_is_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(KeyRefused) as caught:
        Access(Live(KEYED)).resolve(ask("POST", *headers))
    assert "Authorization: Bearer" in caught.value.message
    assert "x-api-key" in caught.value.message
    assert "key-of-alice" not in caught.value.message


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def spy(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", spy)
    for key in ("key-of-alice", "key-of-bob"):
        compared.clear()
        Access(Live(KEYED)).resolve(ask("GET", ("x-api-key", key)))
        assert compared == [ALICE.digest, BOB.digest]


def test_a_generated_key_counts_while_none_is_set() -> None:
    live = Live(replace(KEYED, api_keys=()))
    access = Access(live, ApiKey.of("generated", "cp-generated"))
    request = ask("GET", ("x-api-key", "cp-generated"))
    assert access.resolve(request).name == "generated"
    with pytest.raises(KeyRefused, match="`codex-proxy key`"):
        access.resolve(ask())
    live.replace(KEYED)
    with pytest.raises(KeyRefused) as caught:
        access.resolve(request)
    assert "codex-proxy key" not in caught.value.message


def test_keys_follow_an_edit_and_their_loss_never_opens_a_network_address() -> None:
    live = Live(KEYED)
    access = Access(live)
    request = ask("GET", ("x-api-key", "key-of-alice"))
    assert access.resolve(request).name == "alice"
    live.replace(replace(KEYED, api_keys=(BOB,)))
    with pytest.raises(KeyRefused):
        access.resolve(request)
    live.replace(replace(KEYED, api_keys=()))
    with pytest.raises(KeyRefused, match="restart"):
        access.resolve(request)


def test_without_keys_on_loopback_anyone_here_is_the_local_caller() -> None:
    access = Access(Live(LOOPBACK))
    assert access.resolve(ask("POST")) is LOCAL
    assert access.resolve(ask("POST", ("Authorization", "Bearer dummy"))) is LOCAL
    json = ("Content-Type", "application/json; charset=utf-8")
    assert access.resolve(ask("POST", json, body=True)) is LOCAL
    assert access.resolve(ask("POST", ("Content-Type", "application/vnd.x+json"), body=True)) is LOCAL


def test_keys_that_are_set_count_on_loopback_too() -> None:
    with pytest.raises(KeyRefused):
        Access(Live(replace(LOOPBACK, api_keys=(ALICE,)))).resolve(ask())


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.:1",
        "127.0.0.1",
        "127.8.9.1:80",
        "[::1]:8080",
        "[::1]",
        "box.lan",
        "",
    ],
)
def test_our_own_hosts_pass(host: str) -> None:
    live = Live(replace(LOOPBACK, allowed_hosts=("box.lan",)))
    assert Access(live).resolve(ask("POST", ("Host", host))) is LOCAL


def test_the_listen_host_is_ours() -> None:
    for listen in ("localhost:1", "[::1]:1"):
        host = listen.upper()
        assert Access(Live(Settings(listen=listen))).resolve(ask("GET", ("Host", host))) is LOCAL


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8080", "localhost.evil.example", "sub.localhost", "127.0.0.1.evil.example",
        "10.0.0.1", "0.0.0.0", "[::2]", "user@localhost", "localhost:8080:1", "localhost, x", "[::1", "127.1", "box.lan",
    ],
)  # fmt: skip
def test_a_foreign_host_is_refused(host: str) -> None:
    """A name whose owner points it at 127.0.0.1 makes his page same-origin with us."""
    with pytest.raises(RequestError) as caught:
        Access(Live(LOOPBACK)).resolve(ask("GET", ("Host", host)))
    assert (caught.value.status, caught.value.code) == (403, "forbidden_host")
    assert "allowed-hosts" in caught.value.message


def test_two_hosts_are_none() -> None:
    with pytest.raises(RequestError) as caught:
        Access(Live(LOOPBACK)).resolve(ask("GET", ("Host", "localhost"), ("Host", "localhost")))
    assert caught.value.code == "forbidden_host"


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("HTTP://LOCALHOST:8080", "localhost:8080"),
        ("http://[::1]:8080", "[::1]:8080"),
        ("https://localhost", "localhost"),
        ("http://localhost:80", "localhost"),
    ],
)
def test_a_page_of_our_own_passes(origin: str, host: str) -> None:
    request = ask("POST", ("Host", host), ("Origin", origin), ("Sec-Fetch-Site", "same-origin"))
    assert Access(Live(LOOPBACK)).resolve(request) is LOCAL


@pytest.mark.parametrize(
    "header",
    [
        ("Origin", "null"),
        ("Origin", ""),
        ("Origin", "http://evil.example"),
        ("Origin", "http://127.0.0.1:3000"),
        ("Origin", "http://localhost:8080"),
        ("Origin", "https://127.0.0.1"),
        ("Origin", "http://127.0.0.1:8080.evil.example"),
        ("Origin", "http://127.0.0.1:8080@evil.example"),
        ("Origin", "http://[::1"),
        ("Origin", "file://127.0.0.1:8080"),
        ("Sec-Fetch-Site", "cross-site"),
        ("Sec-Fetch-Site", "same-site"),
        ("Sec-Fetch-Site", "none, cross-site"),
    ],
)
@pytest.mark.parametrize("settings", [LOOPBACK, Settings(listen=":8080", auth="none")])
def test_a_page_of_another_origin_is_refused(header: tuple[str, str], settings: Settings) -> None:
    with pytest.raises(RequestError) as caught:
        Access(Live(settings)).resolve(ask("POST", header))
    assert (caught.value.status, caught.value.code) == (403, "forbidden_origin")
    assert "api-keys" in caught.value.message


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", None]
)
def test_a_body_that_a_page_could_send_is_refused(kind: str | None) -> None:
    headers = [("Content-Type", kind)] if kind is not None else []
    with pytest.raises(RequestError) as caught:
        Access(Live(LOOPBACK)).resolve(ask("POST", *headers, body=True))
    assert (caught.value.status, caught.value.code) == (415, "unsupported_content_type")


def test_a_key_makes_all_of_that_harmless() -> None:
    headers = [("x-api-key", "key-of-alice"), ("Origin", "http://evil.example"), ("Host", "evil.example")]
    caller = Access(Live(replace(LOOPBACK, api_keys=(ALICE,)))).resolve(ask("POST", *headers, body=True))
    assert caller.name == "alice"


def test_auth_none_opens_a_network_address_under_any_name() -> None:
    access = Access(Live(Settings(listen=":8080", auth="none")))
    assert access.resolve(ask("GET", ("Host", "proxy.lan:8080"))) is LOCAL
    assert access.resolve(ask("GET", ("Host", "proxy.lan"), ("Origin", "https://proxy.lan"))) is LOCAL


def test_auth_none_still_knows_a_key_that_is_set() -> None:
    access = Access(Live(replace(KEYED, auth="none")))
    assert access.resolve(ask("GET", ("x-api-key", "key-of-bob"))).name == "bob"
    assert access.resolve(ask("GET", ("x-api-key", "nonsense"))) is LOCAL


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (Settings(listen=":8080"), True),
        (Settings(listen="0.0.0.0:8080"), True),
        (Settings(listen="[::]:8080"), True),
        (Settings(listen="192.168.1.4:8080"), True),
        (LOOPBACK, False),
        (Settings(listen="localhost:8080"), False),
        (Settings(listen="[::1]:8080"), False),
        (KEYED, False),
        (Settings(listen=":8080", auth="none"), False),
    ],
)
def test_a_key_is_needed_where_a_network_reaches_us_and_none_is_set(settings: Settings, needed: bool) -> None:
    assert needs_key(settings) is needed


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_client_key_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "data"
    assert read_client_key(folder) is None
    key, created = ensure_client_key(folder)
    assert created
    assert key.startswith("cp-")
    assert len(key) == 46
    assert ensure_client_key(folder) == (key, False)
    assert read_client_key(folder) == key
    assert mode(folder / "client-key") == 0o600
    assert mode(folder) == 0o700
    assert [path.name for path in folder.iterdir()] == ["client-key"]


def test_two_keys_made_differ(tmp_path: Path) -> None:
    assert ensure_client_key(tmp_path / "a")[0] != ensure_client_key(tmp_path / "b")[0]


def test_daemons_that_start_at_once_agree_on_one_key(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    found: list[tuple[str, bool]] = []

    def start() -> None:
        barrier.wait()
        found.append(ensure_client_key(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key for key, _ in found}) == 1
    assert sum(created for _, created in found) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["client-key"]


def test_a_file_system_without_links_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(one: Path, other: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    key, created = ensure_client_key(tmp_path)
    assert created
    assert ensure_client_key(tmp_path) == (key, False)
    assert mode(tmp_path / "client-key") == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["client-key"]


def test_a_key_file_open_to_others_is_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "client-key"
    path.write_text("a-key-of-my-own-choice\n", encoding="ascii")
    os.chmod(path, 0o644)
    assert ensure_client_key(tmp_path) == ("a-key-of-my-own-choice", False)
    assert mode(path) == 0o600
    assert "a-key-of-my" not in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"short", "no usable key"),
        (b"\xff\xfe" * 20, "no usable key"),
    ],
)
def test_a_spoilt_key_file_is_named_and_left(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "client-key"
    path.write_bytes(content)
    for use in (ensure_client_key, read_client_key):
        with pytest.raises(ConfigError, match=words) as caught:
            use(tmp_path)
        assert str(path) in caught.value.message
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_is_a_setting_to_correct(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file", encoding="ascii")
    with pytest.raises(ConfigError, match="data-dir"):
        ensure_client_key(tmp_path / "data" / "deeper")
    (tmp_path / "client-key").mkdir()
    with pytest.raises(ConfigError, match="data-dir"):
        read_client_key(tmp_path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_the_key_once_and_a_log_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    key = "cp-the-key-itself-0123456789"
    for created, terminal, seen in (
        (True, Terminal(), True),
        (False, Terminal(), False),
        (True, io.StringIO(), False),
    ):
        announce(key, created, tmp_path, terminal)
        assert (key in terminal.getvalue()) is seen
    assert key not in caplog.text
    assert str(tmp_path / "client-key") in caplog.text


# -- guesses at what is the owner's -------------------------------------------------------

ADMIN = "the-key-of-the-admin"
OWNED = replace(KEYED, admin_key=ApiKey.of("admin", ADMIN))
THERE = "203.0.113.7"


def guarded(settings: Settings = OWNED) -> tuple[Access, ManualClock]:
    clock = ManualClock()
    return Access(Live(settings), throttle=Throttle(clock.monotonic)), clock


def offered(access: Access, *keys: str, level: Level = Level.OWNER, remote: str = THERE) -> int | str:
    """Offer keys, each in a header of its own; return the status, or the name of who got in."""
    headers = [
        ("Authorization", f"Bearer {key}") if n % 2 else ("x-api-key", key) for n, key in enumerate(keys)
    ]
    try:
        return access.admit(ask("GET", *headers).clone(remote=remote), level).name
    except (KeyRefused, TooManyGuesses) as exc:
        return exc.status


@pytest.mark.parametrize("level", [Level.OWNER, Level.ADMIN, Level.METRICS])
def test_guesses_at_the_admin_key_become_slow(level: Level) -> None:
    access, clock = guarded()
    assert [offered(access, f"guess {n}", level=level) for n in range(7)] == [401] * 5 + [429] * 2
    # The right one too, as at the log-in: else it could be told from the others.
    assert offered(access, ADMIN, level=level) == 429
    assert offered(access, ADMIN, level=level, remote="198.51.100.1") == "admin"
    clock.advance(2.0)
    assert offered(access, ADMIN, level=level) == "admin"
    # It made no new ones free.
    assert [offered(access, f"another {n}", level=level) for n in range(2)] == [401, 429]


def test_all_that_is_the_owners_counts_together() -> None:
    access, _ = guarded()
    levels = [Level.OWNER, Level.ADMIN, Level.METRICS] * 2
    assert [offered(access, f"guess {n}", level=level) for n, level in enumerate(levels)] == [401] * 5 + [429]


def test_every_key_that_a_request_brings_is_a_guess() -> None:
    """The head of one request has room for thousands."""
    access, _ = guarded()
    assert offered(access, *(f"guess {n}" for n in range(50)), ADMIN) == 429
    access, _ = guarded()
    assert offered(access, "wrong", ADMIN) == "admin"


def test_who_sends_no_key_guesses_nothing() -> None:
    access, _ = guarded()
    assert [offered(access) for _ in range(100)] == [401] * 100
    assert offered(access, ADMIN) == "admin"
    for n in range(6):
        offered(access, f"guess {n}")
    assert offered(access) == 401


def test_a_tool_with_an_old_key_keeps_nobody_out() -> None:
    access, clock = guarded()
    for _ in range(200):
        assert offered(access, "the-former-admin-key") == 401
        clock.advance(15.0)
        assert offered(access, ADMIN) == "admin"


def test_client_keys_are_guesses_only_at_what_is_the_owners() -> None:
    access, _ = guarded()
    for n in range(20):
        assert offered(access, f"guess {n}", level=Level.KEYED) == 401
    # One of the configuration is no owner's while there is an admin-key: the log-in counts it too.
    for _ in range(20):
        assert offered(access, "key-of-alice", level=Level.OWNER) == 401
    assert offered(access, ADMIN) == "admin"
    for n in range(6):
        offered(access, f"guess {n}")
    assert offered(access, "key-of-alice", level=Level.KEYED) == "alice"


def test_without_an_admin_key_guesses_at_client_keys_are_slow_at_what_is_the_owners() -> None:
    access, _ = guarded(KEYED)
    assert offered(access, "key-of-bob") == "bob"
    assert [offered(access, f"guess {n}") for n in range(6)] == [401] * 5 + [429]


@pytest.mark.parametrize(
    "settings",
    [LOOPBACK, Settings(listen=":8080", auth="none"), replace(OWNED, metrics="open")],
)
def test_where_no_key_is_needed_none_is_guessed(settings: Settings) -> None:
    access, _ = guarded(settings)
    assert {offered(access, f"guess {n}", level=Level.METRICS) for n in range(100)} == {LOCAL.name}


def test_guesses_from_everywhere_keep_out_neither_this_machine_nor_where_a_right_key_came_from() -> None:
    access, _ = guarded()
    assert offered(access, ADMIN, remote="198.51.100.1") == "admin"
    for n in range(70):
        offered(access, f"guess {n}", remote=f"192.0.2.{n}")
    assert offered(access, ADMIN, remote="198.51.100.2") == 429
    assert offered(access, ADMIN, remote="198.51.100.1") == "admin"
    assert offered(access, ADMIN, remote="127.0.0.1") == "admin"


def test_guesses_are_told_in_the_audit_log_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    access, _ = guarded()
    for _ in range(3):
        for n in range(20):
            offered(access, f"guess {n}")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        *[("codex_proxy.audit", f"owner key refused reason=unknown_key from={THERE}")] * 5,
        # Once, however often: a log is not filled by who is kept out.
        ("codex_proxy.audit", f"owner key refused reason=throttled from={THERE}"),
    ]
