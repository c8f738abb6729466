"""What a forwarder is told, and by whom."""

from pathlib import Path
from typing import Any

import pytest

from codex_proxy.errors import ConfigError
from codex_proxy.forwarder.settings import VARIABLES, load

FAR = "http://far.test:3000"


def test_nothing_but_an_upstream_is_needed() -> None:
    settings = load({"upstream": [FAR]}, {})
    assert [one.url for one in settings.routes.default] == [FAR]
    assert (settings.host, settings.port, settings.timeout, settings.rate_limit) == (
        "127.0.0.1",
        8000,
        300,
        0,
    )
    assert settings.key is None
    assert settings.is_loopback


def test_the_environment_says_the_same() -> None:
    settings = load({}, {
        "UPSTREAM_SERVER_A": "http://a.test:1/v1, https://b.test",
        "UPSTREAM_ROUTES": "1=http://c.test u2=http://d.test 1=http://e.test",
        "FORWARD_HOST": "0.0.0.0", "PORT": "9000", "UPSTREAM_TIMEOUT_SEC": "12.5", "FORWARD_DRAIN_SEC": "3",
        "FORWARD_RATE_LIMIT": "10", "FORWARD_MAX_CONNECTIONS": "7", "FORWARD_TRUST": "10.0.0.0/8,::1", "FORWARD_KEY": "k" * 16,
        "FORWARD_ADMIN_KEY": "a" * 16, "DEBUG_LOG": "1",
    })  # fmt: skip
    assert [one.url for one in settings.routes.default] == ["http://a.test:1", "https://b.test"]
    routes = {uid: [one.name for one in found] for uid, found in settings.routes.by_uid.items()}
    assert routes == {1: ["c.test", "e.test"], 2: ["d.test"]}
    assert (settings.host, settings.port, settings.timeout) == ("0.0.0.0", 9000, 12.5)
    assert (settings.drain_timeout, settings.rate_limit, len(settings.trust)) == (3, 10, 2)
    assert settings.max_connections == 7
    assert (settings.key, settings.admin_key, settings.debug) == ("k" * 16, "a" * 16, True)
    assert not settings.is_loopback
    assert "k" * 16 not in repr(settings)


def test_flags_win_over_the_environment(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("f" * 20 + "\n", encoding="utf-8")
    settings = load(
        {"upstream": [FAR], "port": "0", "timeout": "7", "key_file": str(tmp_path / "key"), "host": "::1"},
        {
            "UPSTREAM_SERVER_A": "http://other.test", "PORT": "9000", "UPSTREAM_TIMEOUT_SEC": "nonsense",
            "FORWARD_KEY": "e" * 20, "FORWARD_HOST": "0.0.0.0", "DEBUG_LOG": "0",
        },
    )  # fmt: skip
    assert [one.url for one in settings.routes.default] == [FAR]
    assert (settings.port, settings.timeout, settings.key, settings.host) == (0, 7, "f" * 20, "::1")
    assert settings.is_loopback


@pytest.mark.parametrize(
    ("flags", "environ", "words"),
    [
        ({"upstream": []}, {}, "there is no upstream"),
        ({"upstream": ["far.test"]}, {}, "--upstream: is no http"),
        ({"upstream": ["http://169.254.169.254/v1"]}, {}, "--upstream: is a link-local address"),
        ({"route": ["1=http://metadata.google.internal"]}, {}, "--route: is a cloud's metadata service"),
        ({"max_connections": "0"}, {}, "--max-connections: '0' will not do, a whole number from 1 to"),
        ({}, {"UPSTREAM_SERVER_A": "ftp://x"}, "UPSTREAM_SERVER_A: is no http"),
        ({"upstream": ["http://me:hidden-word@far.test"]}, {}, "--upstream: holds a name or password"),
        ({"port": "x"}, {}, "--port: 'x' will not do, a whole number from 0 to 65535 would"),
        ({"port": "65536"}, {}, "--port: '65536'"),
        ({}, {"PORT": "80.5"}, "PORT: '80.5'"),
        ({"timeout": "0"}, {}, "--timeout: '0'"),
        ({"timeout": "nan"}, {}, "--timeout: 'nan'"),
        ({"timeout": "inf"}, {}, "--timeout: 'inf'"),
        ({}, {"UPSTREAM_TIMEOUT_SEC": "-1"}, "UPSTREAM_TIMEOUT_SEC: '-1'"),
        ({"rate_limit": "1e3"}, {}, "--rate-limit: '1e3'"),
        ({"drain_timeout": "x"}, {}, "--drain-timeout: 'x'"),
        ({"trust": ["all"]}, {}, "--trust: 'all' will not do"),
        ({"route": ["x=http://a"]}, {}, "--route: 'x' is no route"),
        ({"route": ["1"]}, {}, "--route: '1' is no route"),
        ({"route": ["1=nowhere"]}, {}, "--route: is no http"),
        ({"route": ["\u0661=http://a"]}, {}, "is no route"),
        ({"route": ["9999999999=http://a"]}, {}, "is no route"),
        ({}, {"DEBUG_LOG": "maybe"}, "DEBUG_LOG: 'maybe' will not do, 1 or 0 would"),
        ({}, {"FORWARD_KEY": "short"}, "FORWARD_KEY: a key has 16"),
        ({}, {"FORWARD_KEY": "k" * 10 + " " + "k" * 10}, "FORWARD_KEY: a key has 16"),
        ({}, {"FORWARD_ADMIN_KEY": "\u00e4" * 20}, "FORWARD_ADMIN_KEY: a key has 16"),
        ({"key_file": "/nowhere/at/all"}, {}, "--key-file: '/nowhere/at/all': No such file"),
        ({}, {"FORWARD_KEY_FILE": "/nowhere"}, "FORWARD_KEY_FILE: '/nowhere'"),
        ({"key_file": "/dev/null"}, {}, "--key-file: '/dev/null' is empty"),
    ],
)
def test_what_is_wrong_is_named(flags: dict[str, Any], environ: dict[str, str], words: str) -> None:
    base: dict[str, Any] = {} if "UPSTREAM_SERVER_A" in environ else {"upstream": [FAR]}
    with pytest.raises(ConfigError) as caught:
        load({**base, **flags}, environ)
    assert words in caught.value.message
    assert "hidden-word" not in caught.value.message
    assert "kkkk" not in caught.value.message


def test_every_setting_has_a_variable() -> None:
    assert len(set(VARIABLES.values())) == len(VARIABLES)
