"""Settings: what fits, what does not and how that is said, sources, edits while it runs."""

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from codex_proxy import __version__
from codex_proxy.config import (
    GO_KEYS,
    KEYS,
    MAX_SECONDS,
    ApiKey,
    Live,
    Loaded,
    Settings,
    Upstream,
    Watcher,
    Webhook,
    load,
    mask_url,
    masked,
    watch,
)
from codex_proxy.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file's place in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Path("config.yaml")


def read(file: Path, text: str, environ: Mapping[str, str] | None = None) -> Loaded:
    file.write_text(text, encoding="utf-8")
    return load(file, environ or {})


def save(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def errors(file: Path, text: str, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(file, text, environ)
    return caught.value.message.splitlines()


def value(file: Path, key: str, text: str) -> Any:
    return getattr(read(file, f"{key}: {text}\n").settings, KEYS[key].field)


# --- defaults


def test_without_any_source_the_defaults_count(file: Path) -> None:
    loaded = load(None, {})
    assert (loaded.settings, loaded.path, loaded.origins, loaded.warnings) == (Settings(), None, {}, [])


def test_the_defaults_are_those_people_know() -> None:
    settings = Settings()
    assert settings.listen == ":8080"
    assert settings.auth_dir == Path("auths")
    assert settings.base_url == "https://chatgpt.com/backend-api/codex"
    assert settings.refresh_interval == 3000
    assert (settings.max_retry, settings.refresh_concurrency) == (2, 50)
    assert settings.health_check_interval == 300
    assert (settings.health_check_max_failures, settings.health_check_concurrency) == (3, 5)
    assert settings.max_body_bytes == 64 * 1024 * 1024
    assert settings.user_agent == f"codex-proxy/{__version__}"


def test_every_field_has_a_key_and_every_key_a_field() -> None:
    assert set(Settings.__dataclass_fields__) == {key.field for key in KEYS.values()}


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().max_retry = 3  # type: ignore[misc]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~\n", "{}\n", "\ufeff# with a mark\n"])
def test_a_file_that_says_nothing_is_the_defaults(file: Path, text: str) -> None:
    assert read(file, text).settings == Settings()


def test_a_key_without_a_value_is_its_default(file: Path) -> None:
    loaded = read(file, "api-keys:\n  # - sk-1\nmax-retry:\n")
    assert (loaded.settings, loaded.origins) == (Settings(), {})


# --- what fits


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("listen", "127.0.0.1:9000", "127.0.0.1:9000"),
        ("listen", ":9000", ":9000"),
        ("listen", "'[::1]:9000'", "[::1]:9000"),
        ("listen", "localhost:0", "localhost:0"),
        ("auth-dir", "/srv/auths", Path("/srv/auths")),
        ("data-dir", "~/codex", Path.home() / "codex"),
        ("base-url", "http://127.0.0.1:9/backend/", "http://127.0.0.1:9/backend"),
        ("oauth-issuer", "https://issuer.test", "https://issuer.test"),
        ("proxy-url", "''", ""),
        ("proxy-url", "http://proxy.test", "http://proxy.test"),
        ("proxy-url", "socks5h://user:pw@proxy.test:1080/", "socks5h://user:pw@proxy.test:1080"),
        ("upstream-transport", "Aiohttp", "aiohttp"),
        ("compress-uploads", "off", "off"),
        ("compress-uploads", "'off'", "off"),
        ("compress-uploads", "ZSTD", "zstd"),
        ("log-level", "WARNING", "warn"),
        ("log-level", "debug", "debug"),
        ("refresh-interval", "0.5", 0.5),
        ("refresh-interval", "90s", 90.0),
        ("refresh-interval", "5m", 300.0),
        ("refresh-interval", "1h30m", 5400.0),
        ("refresh-interval", "'3000'", 3000.0),
        ("connect-timeout", "250ms", 0.25),
        ("idle-timeout", "1d", 86400.0),
        ("health-check-interval", "0", 0.0),
        ("drain-timeout", "0", 0.0),
        ("max-retry", "0", 0),
        ("max-retry", "'10'", 10),
        ("max-body-bytes", "1024", 1024),
        ("max-body-bytes", "64 KiB", 65536),
        ("max-body-bytes", "1.5MB", 1_500_000),
        ("max-body-bytes", "4gib", 2**32),
        ("auth", "none", "none"),
        ("allowed-hosts", "[Proxy.Test., '[::1]', 10.0.0.1, proxy.test]", ("proxy.test", "::1", "10.0.0.1")),
        ("originator", "my tool", "my tool"),
        ("user-agent", "tool/1 (x)", "tool/1 (x)"),
        (
            "model-profiles",
            "{some-model: lite, other: standard}",
            {"some-model": "lite", "other": "standard"},
        ),
        ("models-client-version", "'0.200.1-beta.2'", "0.200.1-beta.2"),
    ],
)
def test_a_value_that_fits(file: Path, key: str, text: str, expected: object) -> None:
    assert value(file, key, text) == expected


@pytest.mark.parametrize(
    ("listen", "host", "port", "is_loopback"),
    [
        (":8080", None, 8080, False),
        ("*:8080", None, 8080, False),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
        ("[::]:80", "::", 80, False),
        ("127.0.0.1:80", "127.0.0.1", 80, True),
        ("127.9.9.9:80", "127.9.9.9", 80, True),
        ("[::1]:80", "::1", 80, True),
        ("[::ffff:127.0.0.1]:80", "::ffff:127.0.0.1", 80, True),
        ("LocalHost:80", "LocalHost", 80, True),
        ("localhost.evil.test:80", "localhost.evil.test", 80, False),
        ("192.168.1.2:80", "192.168.1.2", 80, False),
    ],
)
def test_where_we_listen(listen: str, host: str | None, port: int, is_loopback: bool) -> None:
    settings = Settings(listen=listen)
    assert (settings.listen_host, settings.listen_port, settings.is_loopback) == (host, port, is_loopback)


# --- what does not


@pytest.mark.parametrize(
    ("key", "text", "why"),
    [
        ("listen", "8080", 'write ":8080"'),
        ("listen", "localhost", "not an address with a port"),
        ("listen", "'::1:8080'", "not an address with a port"),
        ("listen", "'[nope]:1'", "no IPv6 address"),
        ("listen", "':70000'", "no such port"),
        ("listen", "'a b:1'", "not a host name"),
        ("listen", "a..b:1", "not a host name"),
        ("listen", f"{'a' * 64}.test:1", "not a host name"),
        ("listen", "''", "not an address with a port"),
        ("auth-dir", "''", "not a path"),
        ("auth-dir", "12", "put it in quotes"),
        ("auth-dir", "[a]", "not a text"),
        ("base-url", "chatgpt.com/backend-api", "does not begin with http"),
        ("base-url", "'https:///x'", "names no host"),
        ("base-url", "https://user:pw@host.test", "user or password"),
        ("base-url", "https://host.test/?a=b", "query"),
        ("base-url", "'https://host.test/a b'", "space"),
        ("base-url", "'https://host.test:port'", "not a URL"),
        ("base-url", "https://host..test", "not a URL"),
        ("oauth-issuer", f"https://{'a' * 64}.test", "not a URL"),
        ("oauth-issuer", "ftp://host.test", "does not begin with http"),
        ("proxy-url", "ftp://proxy.test", "unknown kind of proxy"),
        ("upstream-transport", "httpx", "no such choice"),
        ("compress-uploads", "gzip", "no such choice"),
        ("compress-uploads", "on", "not a text"),
        ("proxy-url", "proxy.test:1080", "scheme"),
        ("proxy-url", "'http://'", "names no host"),
        ("proxy-url", "socks5://proxy.test", "needs its port"),
        ("proxy-url", "http://proxy.test/path", "no path"),
        ("log-level", "loud", "no such choice"),
        ("refresh-interval", "0", "out of range"),
        ("refresh-interval", "-1", "out of range"),
        ("refresh-interval", "true", "not a time"),
        ("refresh-interval", "soon", "not a time"),
        ("refresh-interval", ".inf", "out of range"),
        ("refresh-interval", ".nan", "out of range"),
        ("refresh-interval", str(MAX_SECONDS + 1), "out of range"),
        ("refresh-interval", "1" + "0" * 400, "out of range"),
        ("health-check-interval", "off", "not a time"),
        ("max-retry", "11", "out of range"),
        ("max-retry", "-1", "out of range"),
        ("max-retry", "1.5", "not a whole number"),
        ("max-retry", "true", "not a whole number"),
        ("health-check-max-failures", "0", "out of range"),
        ("health-check-concurrency", "0", "out of range"),
        ("refresh-concurrency", "1001", "out of range"),
        ("max-body-bytes", "64 parsecs", "not a size"),
        ("max-body-bytes", "100", "out of range"),
        ("max-body-bytes", "true", "not a size"),
        ("auth", "off", "not a text"),
        ("auth", "maybe", "no such choice"),
        ("allowed-hosts", "proxy.test", "not a list"),
        ("allowed-hosts", "['http://proxy.test']", "item 1"),
        ("allowed-hosts", "[a.test, 'b.test:80']", "item 2"),
        ("allowed-hosts", "[1]", "item 1"),
        ("trusted-proxies", "10.0.0.1", "not a list"),
        ("trusted-proxies", "[10.0.0.1, relay.test]", "item 2"),
        ("trusted-proxies", "[10.0.0.0/99]", "item 1"),
        ("originator", "'a\\nb'", "not fit for a header"),
        ("originator", "''", "not fit for a header"),
        ("user-agent", "tööl", "not fit for a header"),
        ("model-profiles", "[lite]", "not a mapping"),
        ("model-profiles", "{some-model: heavy}", "'heavy'"),
        ("model-profiles", "{5: lite}", "no model id"),
        ("model-map", "[a]", "not a mapping"),
        ("model-map", "{5: a}", "no model name"),
        ("model-map", "{'': a}", "not empty"),
        ("model-map", "{a: b, A: c}", "there twice"),
        ("model-map", "{a: 5}", "neither a model nor a list"),
        ("model-map", "{a: []}", "neither a model nor a list"),
        ("model-map", "{a: [b, 5]}", "5, which is no model name"),
        ("model-map", "{a: 'b-*'}", "'b-*', which is no model name"),
        ("models-client-version", "0.169", "not a text"),
        ("models-client-version", "latest", "not a version"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(file: Path, key: str, text: str, why: str) -> None:
    (error,) = errors(file, f"# a comment first\n{key}: {text}\n")
    assert error.startswith(f"config.yaml:2: {key} = ")
    assert why in error
    assert error.endswith(f"; want {KEYS[key].range}")


def test_all_that_is_wrong_is_said_at_once(file: Path) -> None:
    said = errors(file, "max-retry: 99\nlog-level: loud\nnope-at-all: 1\n", {"CODEX_PROXY_AUTH": "maybe"})
    assert [error.split(" ")[0] for error in said] == [
        "config.yaml:1:",
        "config.yaml:2:",
        "config.yaml:3:",
        "environment:",
    ]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("api-key", "api-keys"),
        ("auth_dir", "auth-dir"),
        ("Listen", "listen"),
        ("max-retries", "max-retry"),
        ("proxy-url-fil", "proxy-url-file"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(file: Path, name: str, near: str) -> None:
    assert errors(file, f"{name}: 1\n") == [f"config.yaml:1: unknown key {name!r}; did you mean {near}?"]


def test_a_key_like_nothing_we_know_points_to_the_documentation(file: Path) -> None:
    (error,) = errors(file, "quux: 1\n")
    assert "docs/configuration.md" in error


def test_a_key_that_is_there_twice_is_named_with_both_lines(file: Path) -> None:
    assert errors(file, "max-retry: 1\nlisten: ':1'\nmax-retry: 2\n") == [
        "config.yaml:3: max-retry is there twice, in line 1 and in line 3"
    ]


def test_a_name_that_is_twice_inside_a_value_is_an_error(file: Path) -> None:
    (error,) = errors(file, "model-profiles:\n  a: lite\n  a: standard\n")
    assert error == "config.yaml:1: model-profiles: line 3 repeats a name that is there already"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("- listen\n", "config.yaml:1: not a mapping"),
        ("listen\n", "config.yaml:1: not a mapping"),
        ("max-retry: 1\n\tauth: keys\n", "config.yaml:2:1: not YAML"),
        ("api-keys: [a, b\nmax-retry: 1\n", "config.yaml:2:"),
        ("max-retry: 1\n# \x01\n", "config.yaml:2: not YAML"),
        ("? [a]\n: 1\n", "config.yaml:1: a key must be a word"),
        ("a: 1\n---\nb: 1\n", "config.yaml:2:1: not YAML"),
        ("max-retry: " + "[" * 1000, "config.yaml: nested too deeply"),
        ("listen: !!python/object:os.system x\n", "config.yaml:1: listen: not a plain value"),
        ("max-retry: 2024-13-45\n", "config.yaml:1: max-retry: not a plain value"),
    ],
)
def test_what_is_not_yaml_is_named_with_its_line(file: Path, text: str, where: str) -> None:
    assert errors(file, text)[0].startswith(where)


def test_tabs_are_explained(file: Path) -> None:
    assert errors(file, "api-keys:\n\t- a\n")[0].endswith("(indent with spaces, not tabs)")


def test_bytes_that_are_no_text_are_named_with_their_line(file: Path) -> None:
    file.write_bytes(b"max-retry: 1\nlisten: \xff\n")
    with pytest.raises(ConfigError, match=r"config.yaml: line 2 is not UTF-8"):
        load(file, {})


def test_a_file_that_is_not_there_is_an_error_when_it_was_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"elsewhere.yaml: cannot be read: No such file"):
        load(Path("elsewhere.yaml"), {})


def test_a_folder_and_a_giant_are_no_configuration(file: Path) -> None:
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match="folder: cannot be read"):
        load(Path("folder"), {})
    assert "larger than 1 MiB" in errors(file, "#" * (1024 * 1024 + 1))[0]


# --- client keys


def names_and_digests(keys: tuple[ApiKey, ...]) -> dict[str, bytes]:
    return {key.name: key.digest for key in keys}


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[sk-1, sk-2]", {"key-1": "sk-1", "key-2": "sk-2"}),
        ("[sk-1, {phone: sk-2}]", {"key-1": "sk-1", "phone": "sk-2"}),
        ("['laptop: sk-1']", {"laptop": "sk-1"}),
        ("{laptop: sk-1, my phone: sk-2}", {"laptop": "sk-1", "my phone": "sk-2"}),
        ("['a:b', '12345']", {"key-1": "a:b", "key-2": "12345"}),
        ("[]", {}),
    ],
)
def test_client_keys_with_and_without_names(file: Path, text: str, expected: dict[str, str]) -> None:
    keys = read(file, f"api-keys: {text}\n").settings.api_keys
    assert names_and_digests(keys) == {name: digest(key) for name, key in expected.items()}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sk-canary", "neither a list nor a mapping"),
        ("['']", "entry 1 is empty"),
        ("[sk-canary, sk-canary]", "entry 2 is the same key as key-1"),
        ("[12345]", "entry 1 is not a text: put it in quotes"),
        ("{phone: 12345}", "entry 1 (phone) is not a text"),
        ("['sk canary']", "entry 1 has a space"),
        ("[' sk-canary']", "entry 1 has a space"),
        ("['sk-canäry']", "entry 1 has a space or a character that no header can carry"),
        ("[sk-canary, {key-1: sk-other}]", "the name 'key-1' is there twice"),
        ("[{1: sk-canary}]", "entry 1 has no usable name"),
        ("[[sk-canary]]", "entry 1 is not a text"),
    ],
)
def test_client_keys_that_cannot_work_are_refused_without_being_shown(
    file: Path, text: str, why: str
) -> None:
    (error,) = errors(file, f"api-keys: {text}\n")
    assert error.startswith("config.yaml:1: api-keys = ***: ")
    assert why in error
    assert "canary" not in error
    assert "12345" not in error


@pytest.mark.parametrize("text", ["[*canary]", "[!canary x]", "!canary x", "&canary *canary2"])
def test_an_unquoted_key_that_yaml_takes_for_something_else_is_not_shown(file: Path, text: str) -> None:
    said = "\n".join(errors(file, f"api-keys: {text}\n"))
    assert "canary" not in said
    assert "quotes" in said


def test_a_secret_appears_in_no_text_of_the_settings(file: Path) -> None:
    text = "api-keys: {laptop: sk-canary}\nproxy-url: http://someone:canary@proxy.test:3128\n"
    loaded = read(file, text)
    shown = masked(loaded.settings)
    assert "canary" not in f"{loaded} {shown}"
    assert shown["api-keys"] == [{"laptop": "***"}]
    assert shown["proxy-url"] == "http://***@proxy.test:3128"
    assert digest("sk-canary") not in repr(loaded.settings).encode()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("", ""),
        ("http://proxy.test", "http://proxy.test"),
        ("socks5://u:canary@[::1]:1080", "socks5://***@[::1]:1080"),
        ("proxy.test:1080:u:canary", "***"),
        ("http://proxy.test:1080:u:canary", "***"),
        ("u:canary@proxy.test", "***"),
        ("http://u:can ary@proxy.test", "***"),
        ("http://proxy.test/canary?canary", "http://proxy.test"),
    ],
)
def test_a_proxy_is_shown_without_its_password(url: str, shown: str) -> None:
    assert mask_url(url) == shown


@pytest.mark.parametrize(
    "url", ["ftp://u:canary@proxy.test", "proxy.test:1:u:canary", "http://u:canary@h.test/p"]
)
def test_an_error_about_a_proxy_does_not_show_its_password(file: Path, url: str) -> None:
    assert "canary" not in "\n".join(errors(file, f"proxy-url: {url}\n"))


def test_masked_settings_can_be_written_down_and_read_again() -> None:
    assert set(masked(Settings())) == set(KEYS)
    for key in KEYS.values():
        assert key.parse(masked(Settings())[key.name]) == getattr(Settings(), key.field)


# --- sources


def test_the_environment_wins_over_the_file_and_the_file_over_the_default(file: Path) -> None:
    loaded = read(file, "max-retry: 5\nlog-level: debug\n", {"CODEX_PROXY_MAX_RETRY": " 7 ", "PATH": "x"})
    assert (loaded.settings.max_retry, loaded.settings.log_level) == (7, "debug")
    assert loaded.settings.drain_timeout == 120
    assert set(loaded.origins) == {"max-retry", "log-level"}
    assert loaded.origins == {"max-retry": "environment: CODEX_PROXY_MAX_RETRY", "log-level": "config.yaml:2"}


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_any_key_can_come_from_the_environment(file: Path, key: Any) -> None:
    text, expected = ENVIRONMENT[key.name]
    loaded = load(None, {key.variable: text})
    assert getattr(loaded.settings, key.field) == expected
    assert set(loaded.origins) == {key.name}


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
@pytest.mark.parametrize("by", ["file", "environment"])
def test_any_key_can_come_from_a_file_of_its_own(file: Path, key: Any, by: str) -> None:
    text, expected = ENVIRONMENT[key.name]
    content = text.replace(",", "\n\n# a comment\n") if key.kind == "list" else text
    Path("value.txt").write_text(f"{content}\n", encoding="utf-8")
    if by == "file":
        loaded = read(file, f"{key.name}-file: value.txt\n")
    else:
        loaded = load(None, {f"{key.variable}_FILE": "value.txt"})
    assert getattr(loaded.settings, key.field) == expected


@pytest.mark.parametrize(
    "text", ["short-one", "'with a space in it'", "12345678901234567", "[a]", "'sch\u00f6ner schl\u00fcssel'"]
)
def test_an_admin_key_that_could_be_guessed_or_sent_by_nobody_is_refused_unseen(
    file: Path, text: str
) -> None:
    (error,) = errors(file, f"admin-key: {text}\n")
    assert error.startswith("config.yaml:1: admin-key = ***: ")
    assert text.strip("'") not in error


def test_an_admin_key_is_kept_by_its_digest_and_shown_to_nobody(file: Path) -> None:
    settings = read(file, "admin-key: canary-0123456789\n").settings
    assert settings.admin_key == ApiKey.of("admin", "canary-0123456789")
    assert masked(settings)["admin-key"] == "***"
    assert "canary" not in repr(settings)
    assert masked(Settings())["admin-key"] == ""


ENVIRONMENT: dict[str, tuple[str, object]] = {
    "listen": ("127.0.0.1:1", "127.0.0.1:1"),
    "auth-dir": ("a", Path("a")),
    "data-dir": ("d", Path("d")),
    "base-url": ("http://127.0.0.1:1/", "http://127.0.0.1:1"),
    "oauth-issuer": ("http://127.0.0.1:2", "http://127.0.0.1:2"),
    "proxy-url": ("socks5://127.0.0.1:3", "socks5://127.0.0.1:3"),
    "upstreams": (
        "[{name: a, base-url: 'https://a.test/v1', api-key: sk-1}]",
        (Upstream("a", "https://a.test", "sk-1"),),
    ),
    "accounts-priority": ("-1", -1),
    "log-level": ("error", "error"),
    "log-format": ("json", "json"),
    "metrics": ("open", "open"),
    "telemetry": ("otlp", "otlp"),
    "telemetry-endpoint": ("http://127.0.0.1:4", "http://127.0.0.1:4"),
    "alerts": (
        "{error-share: off}",
        {name: options for name, options in Settings().alerts.items() if name != "error-share"},
    ),
    "alert-webhooks": ("https://a.test/x", (Webhook("generic-1", "generic", "https://a.test/x"),)),
    "refresh-interval": ("1h", 3600.0),
    "max-retry": ("3", 3),
    "health-check-interval": ("1", 1.0),
    "health-check-max-failures": ("4", 4),
    "health-check-concurrency": ("6", 6),
    "refresh-concurrency": ("7", 7),
    "api-keys": ("sk-1, phone: sk-2", (ApiKey.of("key-1", "sk-1"), ApiKey.of("phone", "sk-2"))),
    "admin-key": ("0123456789abcdef", ApiKey.of("admin", "0123456789abcdef")),
    "ui": ("off", "off"),
    "auth": ("none", "none"),
    "allowed-hosts": ("a.test, b.test,", ("a.test", "b.test")),
    "trusted-proxies": ("10.0.0.0/8, ::1", (ip_network("10.0.0.0/8"), ip_network("::1"))),
    "connect-timeout": ("1.5", 1.5),
    "first-byte-timeout": ("2", 2.0),
    "compact-timeout": ("3", 3.0),
    "idle-timeout": ("4", 4.0),
    "keep-alive-after": ("5", 5.0),
    "hold-created": ("6", 6.0),
    "max-body-bytes": ("1MiB", 2**20),
    "compress-uploads": ("zstd", "zstd"),
    "upstream-transport": ("aiohttp", "aiohttp"),
    "enable-websocket": ("off", False),
    "strategy": ("Fill-First", "fill-first"),
    "max-concurrency": ("4", 4),
    "queue-timeout": ("2m", 120.0),
    "session-affinity": ("off", False),
    "session-affinity-ttl": ("1h", 3600.0),
    "pool-limits": ("hide", "hide"),
    "keepalive-interval": ("0", 0.0),
    "drain-timeout": ("8", 8.0),
    "originator": ("me", "me"),
    "user-agent": ("me/1", "me/1"),
    "model-profiles": ("{m: lite}", {"m": "lite"}),
    "model-map": ("{a: b, c-*: [d, e-high]}", {"a": ("b",), "c-*": ("d", "e-high")}),
    "models-client-version": ("1.2.3", "1.2.3"),
    "records": ("off", "off"),
    "records-max-age": ("90d", 90 * 86_400.0),
    "records-max-size": ("1GiB", 2**30),
    "capture": ("laptop, phone", ("laptop", "phone")),
    "capture-limit": ("1MiB", 2**20),
    "capture-max-age": ("2h", 7_200.0),
    "ledger": ("billing", "billing"),
    "database-url": ("postgresql://u:p@127.0.0.1:5432/db", "postgresql://u:p@127.0.0.1:5432/db"),
    "max-turns": ("50", 50),
    "reserve-tokens": ("1000", 1000),
}


def test_an_error_in_the_environment_names_the_variable(file: Path) -> None:
    assert errors(file, "", {"CODEX_PROXY_MAX_RETRY": "99"}) == [
        "environment: CODEX_PROXY_MAX_RETRY: max-retry = '99': out of range; want a whole number from 0 to 10"
    ]


def test_an_error_in_a_file_of_its_own_names_both_places(file: Path) -> None:
    Path("retry.txt").write_text("99\n", encoding="utf-8")
    (error,) = errors(file, "max-retry-file: retry.txt\n")
    assert error.startswith("config.yaml:1: retry.txt: max-retry = '99': out of range")


def test_an_empty_variable_counts_as_not_set(file: Path) -> None:
    environ = {"CODEX_PROXY_MAX_RETRY": "", "CODEX_PROXY_API_KEYS": " ", "CODEX_PROXY_API_KEYS_FILE": ""}
    loaded = read(file, "max-retry: 5\napi-keys: [sk-1]\n", environ)
    assert (loaded.settings.max_retry, len(loaded.settings.api_keys)) == (5, 1)


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("CODEX_PROXY_API_KEY", "CODEX_PROXY_API_KEYS"),
        ("CODEX_PROXY_AUTHDIR", "CODEX_PROXY_AUTH_DIR"),
        ("CODEX_PROXY_CONFIG_FILE", "CODEX_PROXY_CONFIG"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(file: Path, variable: str, near: str) -> None:
    assert errors(file, "", {variable: "x"}) == [
        f"environment: {variable}: unknown key; did you mean {near}?"
    ]


def test_variables_that_kubernetes_makes_for_a_service_of_our_name_are_left_alone(file: Path) -> None:
    environ = {
        "CODEX_PROXY_SERVICE_HOST": "10.0.0.1",
        "CODEX_PROXY_SERVICE_PORT": "80",
        "CODEX_PROXY_SERVICE_PORT_HTTP": "80",
        "CODEX_PROXY_PORT": "tcp://10.0.0.1:80",
        "CODEX_PROXY_PORT_80_TCP": "tcp://10.0.0.1:80",
        "CODEX_PROXY_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert load(None, environ).settings == Settings()


def test_a_key_and_its_file_exclude_each_other_in_one_place(file: Path) -> None:
    Path("keys.txt").write_text("sk-2\n", encoding="utf-8")
    assert errors(file, "api-keys: [sk-1]\napi-keys-file: keys.txt\n") == [
        "config.yaml:2: api-keys and api-keys-file are both there; want only one of them"
    ]
    environ = {"CODEX_PROXY_API_KEYS": "sk-1", "CODEX_PROXY_API_KEYS_FILE": "keys.txt"}
    assert errors(file, "", environ) == [
        "environment: CODEX_PROXY_API_KEYS_FILE: CODEX_PROXY_API_KEYS is set too; want only one of them"
    ]
    # In two places the higher one wins.
    loaded = read(file, "api-keys-file: keys.txt\n", {"CODEX_PROXY_API_KEYS": "sk-1"})
    assert names_and_digests(loaded.settings.api_keys) == {"key-1": digest("sk-1")}


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), ("", "is empty"), (" \n", "is empty")])
def test_a_file_of_keys_that_is_gone_or_empty_never_means_no_keys(
    file: Path, content: str | None, why: str
) -> None:
    if content is not None:
        Path("keys.txt").write_text(content, encoding="utf-8")
    (error,) = errors(file, "api-keys-file: keys.txt\n")
    assert error.startswith("config.yaml:1: api-keys from keys.txt: ")
    assert why in error


def test_a_file_key_wants_a_path(file: Path) -> None:
    assert errors(file, "api-keys-file: [a]\n") == ["config.yaml:1: api-keys-file: want the path of a file"]


def test_a_mapping_in_the_environment_that_is_not_yaml_is_an_error(file: Path) -> None:
    (error,) = errors(file, "", {"CODEX_PROXY_MODEL_PROFILES": "{a: "})
    assert error.startswith("environment: CODEX_PROXY_MODEL_PROFILES: model-profiles: not YAML")


def test_the_file_is_found_by_argument_then_by_variable_then_in_the_working_directory(file: Path) -> None:
    for name in ("config.yaml", "a.yaml", "b.yaml"):
        Path(name).write_text(f"originator: {name[0]}\n", encoding="utf-8")
    environ = {"CODEX_PROXY_CONFIG": "a.yaml"}
    assert load(Path("b.yaml"), environ).settings.originator == "b"
    assert load(None, environ).settings.originator == "a"
    assert load(None, {}).settings.originator == "c"
    assert load(None, {}).path == Path("config.yaml")


# --- warnings


def test_a_key_of_the_go_daemon_warns_and_says_what_to_do(file: Path) -> None:
    loaded = read(file, "selector: quota-first\naccounts: []\nmax-retry: 3\n")
    assert loaded.settings.max_retry == 3
    assert [warning.split(": ")[0] for warning in loaded.warnings] == ["config.yaml:1", "config.yaml:2"]
    assert loaded.warnings[0].endswith(GO_KEYS["selector"])


@pytest.mark.parametrize("name", GO_KEYS)
def test_no_key_of_the_go_daemon_stops_the_start(file: Path, name: str) -> None:
    assert name not in KEYS
    assert len(read(file, f"{name}: anything\n").warnings) == 1


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("auth: none\n", "everyone who reaches the port"),
        ("auth: none\nlisten: '127.0.0.1:1'\n", "every program on this machine"),
        ("auth: none\napi-keys: [sk-1]\n", "api-keys are not asked for"),
        (
            "api-keys: [0123456789abcdef]\nadmin-key: 0123456789abcdef\n",
            "whoever has that one is an administrator",
        ),
        ("base-url: http://backend.test\n", "base-url: http://backend.test is not encrypted"),
    ],
)
def test_what_is_allowed_but_risky_warns(file: Path, text: str, warning: str) -> None:
    assert any(warning in said for said in read(file, text).warnings)


def test_a_backend_on_this_machine_does_not_warn(file: Path) -> None:
    assert read(file, "base-url: http://127.0.0.1:1\noauth-issuer: http://localhost:1\n").warnings == []


def test_that_prompts_are_stored_is_said(file: Path) -> None:
    text = "api-keys: {laptop: sk-1}\ncapture: [laptop, desk]\n"
    assert [warning for warning in read(file, text).warnings if "capture" in warning] == [
        "capture: prompts and answers of laptop, desk are stored in data-dir",
        "capture: desk is no name of a client key, so nothing is stored of it",
    ]
    (off,) = [one for one in read(file, "capture: [local]\nrecords: off\n").warnings if "capture" in one]
    assert off.endswith("but not while records are off")
    assert errors(file, "capture: [7]\n")[0].startswith("config.yaml:1: capture = [7]: item 1 is no name")
    assert "out of range" in errors(file, "records-max-age: 9999d\n")[0]
    assert "out of range" in errors(file, "records-max-size: 1MiB\n")[0]


# --- live


def edit(watcher: Watcher, file: Path, text: str) -> list[str] | None:
    """Save *text* and look twice: an edit counts once it is at rest."""
    file.write_text(text, encoding="utf-8")
    assert watcher.look() is None
    loaded = watcher.look()
    return None if loaded is None else watcher.apply(loaded)


def watcher_of(file: Path, text: str = "# nothing\n", environ: Mapping[str, str] | None = None) -> Watcher:
    return Watcher(Live(read(file, text, environ).settings), file, environ or {})


@pytest.mark.parametrize("key", [key for key in KEYS.values() if key.live], ids=lambda key: key.name)
def test_an_edit_of_a_live_key_counts_at_once(file: Path, key: Any) -> None:
    watcher = watcher_of(file)
    Path("value.txt").write_text(
        ENVIRONMENT[key.name][0].replace(",", "\n") if key.kind == "list" else ENVIRONMENT[key.name][0],
        encoding="utf-8",
    )
    assert edit(watcher, file, f"{key.name}-file: value.txt\n") == [key.name]
    assert getattr(watcher.live.current, key.field) == ENVIRONMENT[key.name][1]
    # And back again, by leaving it out.
    assert edit(watcher, file, "# nothing\n") == [key.name]
    assert watcher.live.current == Settings()


@pytest.mark.parametrize("key", [key for key in KEYS.values() if not key.live], ids=lambda key: key.name)
def test_an_edit_of_another_key_waits_for_a_restart_and_says_so_once(
    file: Path, key: Any, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = watcher_of(file)
    line = f"{key.name}: {ENVIRONMENT[key.name][0]}\n"
    assert edit(watcher, file, line) == []
    assert edit(watcher, file, f"{line}max-retry: 1\n") == ["max-retry"]
    assert getattr(watcher.live.current, key.field) == getattr(Settings(), key.field)
    said = [record.getMessage() for record in caplog.records if "restart" in record.getMessage()]
    assert said == [f"setting needs a restart key={key.name}"]


def test_a_pinned_key_stays_whatever_the_file_says(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher = watcher_of(file)
    watcher.live.pin("listen", "0.0.0.0:9")
    assert edit(watcher, file, "listen: '127.0.0.1:1'\nmax-retry: 1\n") == ["max-retry"]
    assert watcher.live.current.listen == "0.0.0.0:9"
    assert not watcher.live.current.is_loopback
    assert not any("restart" in record.getMessage() for record in caplog.records)


def test_an_edit_counts_before_it_is_at_rest_when_somebody_says_so(file: Path) -> None:
    watcher = watcher_of(file)

    async def twice_at_once() -> None:
        await asyncio.gather(watcher.follow(at_once=True), watcher.follow(at_once=True))

    file.write_text("max-retry: 1\n", encoding="utf-8")
    asyncio.run(watcher.follow())
    assert watcher.live.current.max_retry == 2
    file.write_text("max-retry: 3\n", encoding="utf-8")
    asyncio.run(twice_at_once())
    assert watcher.live.current.max_retry == 3
    assert watcher.look() is None
    file.write_text("max-retry: many\n", encoding="utf-8")
    asyncio.run(watcher.follow(at_once=True))
    assert watcher.live.current.max_retry == 3


def test_subscribers_hear_of_changes_until_they_leave() -> None:
    live = Live(Settings())
    heard: list[tuple[int, int]] = []
    leave = live.subscribe(lambda old, new: heard.append((old.max_retry, new.max_retry)))
    assert live.replace(Settings(max_retry=3)) == ["max-retry"]
    assert live.replace(Settings(max_retry=3)) == []
    assert live.replace(Settings(max_retry=3, listen=":1")) == []
    leave()
    assert live.replace(Settings(max_retry=4)) == ["max-retry"]
    assert heard == [(2, 3)]


def test_who_holds_a_snapshot_keeps_it() -> None:
    live = Live(Settings())
    before = live.current
    live.replace(Settings(max_retry=9))
    assert (before.max_retry, live.current.max_retry) == (2, 9)


@pytest.mark.parametrize("broken", ["max-retry: 99\n", "max-retry: [\n", "", "   \n", "quux: 1\n"])
def test_a_broken_edit_keeps_the_old_settings_and_says_so_once(
    file: Path, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = watcher_of(file, "max-retry: 5\napi-keys: [sk-canary]\n")
    before = watcher.live.current
    assert edit(watcher, file, broken) is None
    assert all(watcher.look() is None for _ in range(5))
    assert watcher.live.current is before
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "old settings stay" in said[0]
    assert "config.yaml" in said[0]
    # Mended, it counts again.
    assert edit(watcher, file, "max-retry: 6\napi-keys: [sk-canary]\n") == ["max-retry"]


def test_a_file_that_disappears_keeps_the_old_settings(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text("max-retry: 5\n", encoding="utf-8")
    watcher = Watcher(Live(load(None, {}).settings), None, {})
    file.unlink()
    assert [watcher.look() for _ in range(3)] == [None, None, None]
    assert watcher.live.current.max_retry == 5
    assert "gone" in caplog.text


def test_an_editor_that_renames_over_the_file_is_seen(file: Path) -> None:
    watcher = watcher_of(file, "max-retry: 5\n")
    Path("config.yaml.new").write_text("max-retry: 6\n", encoding="utf-8")
    Path("config.yaml.new").replace(file)
    assert watcher.look() is None
    loaded = watcher.look()
    assert loaded is not None
    assert watcher.apply(loaded) == ["max-retry"]


def test_a_file_that_is_still_being_written_is_left_alone(file: Path) -> None:
    watcher = watcher_of(file)
    for text in ("max-retry: 1\n", "max-retry: 1\nlog-level: debug\n"):
        file.write_text(text, encoding="utf-8")
        assert watcher.look() is None
    loaded = watcher.look()
    assert loaded is not None
    assert set(loaded.origins) == {"max-retry", "log-level"}


def test_saving_the_same_again_does_nothing(file: Path) -> None:
    watcher = watcher_of(file, "max-retry: 5\n")
    assert edit(watcher, file, "max-retry: 5\n") is None


def test_a_file_made_later_counts_too(file: Path) -> None:
    watcher = Watcher(Live(load(None, {}).settings), None, {})
    assert edit(watcher, file, "max-retry: 4\n") == ["max-retry"]


def test_an_edit_of_a_file_that_holds_a_value_counts(file: Path) -> None:
    keys = Path("keys.txt")
    keys.write_text("sk-1\n", encoding="utf-8")
    watcher = watcher_of(file, "api-keys-file: keys.txt\n")
    assert edit(watcher, keys, "laptop: sk-2\n") == ["api-keys"]
    assert names_and_digests(watcher.live.current.api_keys) == {"laptop": digest("sk-2")}
    # The same for a file that an edit named only now.
    other = Path("other.txt")
    other.write_text("sk-3\n", encoding="utf-8")
    assert edit(watcher, file, "api-keys-file: other.txt\n") == ["api-keys"]
    assert edit(watcher, other, "sk-4\n") == ["api-keys"]
    assert names_and_digests(watcher.live.current.api_keys) == {"key-1": digest("sk-4")}


def test_the_environment_stays_above_an_edit(file: Path) -> None:
    watcher = watcher_of(file, environ={"CODEX_PROXY_MAX_RETRY": "7"})
    assert edit(watcher, file, "max-retry: 1\n") == []
    assert watcher.live.current.max_retry == 7


def test_an_edit_between_reading_and_watching_is_not_lost(file: Path) -> None:
    loaded = read(file, "max-retry: 5\n")
    file.write_text("max-retry: 6\n", encoding="utf-8")
    watcher = Watcher(Live(loaded.settings), file, {}, loaded)
    found = watcher.look() or watcher.look()
    assert found is not None
    assert watcher.apply(found) == ["max-retry"]


async def test_watching_brings_an_edit_into_effect_within_two_seconds(file: Path) -> None:
    live = Live(read(file, "max-retry: 5\n").settings)
    elapsed: list[float] = []

    async def sleep(seconds: float) -> None:
        if not elapsed:
            save(file, "max-retry: 6\n")
        elapsed.append(seconds)
        if live.current.max_retry == 6 or len(elapsed) > 20:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await watch(live, file, {}, sleep)
    assert live.current.max_retry == 6
    assert sum(elapsed) <= 2


async def test_watching_survives_a_subscriber_that_fails(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = Live(read(file, "max-retry: 1\n").settings)
    rounds = 0

    def fail(_old: Settings, _new: Settings) -> None:
        raise RuntimeError("no")

    async def sleep(_seconds: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds in {1, 5}:
            save(file, f"max-retry: {rounds + 1}\n")
        if rounds == 10:
            raise asyncio.CancelledError

    live.subscribe(fail)
    with pytest.raises(asyncio.CancelledError):
        await watch(live, file, {}, sleep)
    assert live.current.max_retry == 6
    assert caplog.text.count("following the configuration failed") == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('base-url: "https://me:hunter/2@host/x"', "https://***@host/x"),
        ('oauth-issuer: "https://me:hunter2@host/x"', "https://***@host/x"),
        ('allowed-hosts: ["http://me:hunter2@host"]', "http://***@host"),
        ('listen: "http://me:hunter2@host"', "http://***@host"),
    ],
)
def test_a_password_in_an_address_that_does_not_fit_is_not_said(file: Path, line: str, said: str) -> None:
    (error,) = errors(file, line + "\n")
    assert said in error
    assert "hunter" not in error


@contextlib.contextmanager
def pipe_of(text: str) -> Iterator[Path]:
    """A pipe that says *text* once, as `<(command)` in a shell is."""
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    yield Path(f"/dev/fd/{reader}")
    os.close(reader)


def test_a_configuration_that_comes_through_a_pipe_counts_and_stays(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pipe_of('max-retry: 5\napi-keys: ["sk-1"]\n') as pipe:
        loaded = load(pipe, {})
        assert loaded.settings.max_retry == 5
        watcher = Watcher(Live(loaded.settings), pipe, {}, loaded)
        assert [watcher.look() for _ in range(3)] == [None, None, None]
        assert len(watcher.live.current.api_keys) == 1
    assert caplog.messages == []


def test_a_value_that_comes_through_a_pipe_counts_and_stays(file: Path) -> None:
    with pipe_of("sk-1\nsk-2\n") as pipe:
        loaded = read(file, f"api-keys-file: {pipe}\n")
        assert len(loaded.settings.api_keys) == 2
        watcher = Watcher(Live(loaded.settings), file, {}, loaded)
        assert [watcher.look() for _ in range(3)] == [None, None, None]
        assert len(watcher.live.current.api_keys) == 2


def test_a_named_pipe_in_place_of_the_file_is_a_broken_edit_that_holds_nobody_up(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = watcher_of(file, "max-retry: 5\n")
    file.unlink()
    os.mkfifo(file)
    assert [watcher.look() for _ in range(3)] == [None, None, None]
    assert "not a file" in caplog.text
    file.unlink()
    assert edit(watcher, file, "max-retry: 6\n") == ["max-retry"]


def test_a_file_that_is_emptied_right_after_it_was_read_is_a_broken_edit(file: Path) -> None:
    loaded = read(file, 'api-keys: ["sk-1"]\n')
    file.write_text("", encoding="utf-8")
    watcher = Watcher(Live(loaded.settings), file, {}, loaded)
    assert [watcher.look() for _ in range(3)] == [None, None, None]
    assert len(watcher.live.current.api_keys) == 1


# --- upstreams


def test_the_key_of_an_upstream_may_stand_in_a_file_or_a_variable(file: Path) -> None:
    Path("key.txt").write_text(" sk-canary-1\n", encoding="utf-8")
    text = (
        "upstreams:\n  - {name: a, base-url: 'https://a.test', api-key-file: key.txt}\n"
        "  - {name: b, base-url: 'https://b.test', api-key-env: UP_KEY}\n  - {name: c, base-url: 'https://c.test'}\n"
    )
    loaded = read(file, text, {"UP_KEY": "sk-canary-2"})
    assert [one.api_key for one in loaded.settings.upstreams] == ["sk-canary-1", "sk-canary-2", ""]
    assert "canary" not in repr(loaded.settings)
    assert "canary" not in str(masked(loaded.settings))
    found = errors(file, text.replace("key.txt", "gone.txt"))
    assert found[0].startswith("config.yaml:1: upstreams: a: api-key-file gone.txt: cannot be read")
    assert found[1].startswith("config.yaml:1: upstreams: b: api-key-env UP_KEY: is empty or not set")
    Path("key.txt").write_text("sk canary\n", encoding="utf-8")
    (error,) = errors(file, text, {"UP_KEY": "k"})
    assert "has a space" in error
    assert "canary" not in error


def test_an_edit_of_an_upstreams_key_file_counts(file: Path) -> None:
    Path("key.txt").write_text("sk-1\n", encoding="utf-8")
    save(file, "upstreams: [{name: a, base-url: 'https://a.test', api-key-file: key.txt}]\n")
    loaded = load(file, {})
    watcher = Watcher(Live(loaded.settings), file, {}, loaded)
    assert watcher.look() is None
    Path("key.txt").write_text("sk-2\n", encoding="utf-8")
    assert watcher.look() is None
    edited = watcher.look()
    assert edited is not None
    assert watcher.apply(edited) == ["upstreams"]
    assert watcher.live.current.upstreams[0].api_key == "sk-2"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[{name: a, base-url: 'http://a.test'}, {name: a, base-url: 'http://b.test'}]",
            "'a' is there twice",
        ),
        ("[{name: a, base-url: 'http://a.test', prio: 3}]", "entry 1 (a): 'prio' is none of name, base-url"),
        (
            "[{name: a, base-url: 'http://169.254.169.254/v1'}]",
            "base-url = 'http://169.254.169.254/v1': a link-local",
        ),
        ("[{name: a, base-url: 'http://a.test', api-key: 'sk canary'}]", "api-key = ***: has a space"),
        ("[{name: a, base-url: 'http://u:canary@a.test'}]", "has a user"),
        ("[{base-url: 'http://a.test'}]", "name is missing"),
        ("[a]", "entry 1 is not a mapping"),
        ("nothing", "not a list"),
    ],
)
def test_what_is_wrong_with_an_upstream_is_said_without_its_key(file: Path, text: str, words: str) -> None:
    (error,) = errors(file, f"upstreams: {text}\n")
    assert words in error
    assert "canary" not in error


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("ledger: billing\n", "who reaches the page without a key"),
        ("ledger: personal\napi-keys: [a-client-key]\n", "holders of api-keys"),
        ("database-url: postgresql://u:p@127.0.0.1/db\n", "nothing is kept there"),
    ],
)
def test_a_ledger_without_an_owner_is_a_doubt(file: Path, lines: str, words: str) -> None:
    (warning,) = read(file, lines).warnings
    assert words in warning
    assert "u:p@" not in warning
    assert read(file, "ledger: billing\nadmin-key: a-key-of-the-owner\n").warnings == []


def test_a_key_that_can_be_read_on_the_way_is_a_doubt(file: Path) -> None:
    text = "upstreams: [{name: a, base-url: 'http://a.example', api-key: k}, {name: b, base-url: 'http://10.0.0.1', api-key: k}]\n"
    (warning,) = read(file, text).warnings
    assert warning.startswith("upstreams: a: http://a.example is not encrypted")
