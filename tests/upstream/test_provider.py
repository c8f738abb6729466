"""One upstream: what it takes and under which name, and what becomes of it after a failure."""

import random
from typing import Any

import pytest

from codex_proxy.config import BadUpstream, Upstream, masked_upstream, read_upstream
from codex_proxy.protocol.native import Native
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.upstream.ejection import BASE_SECONDS
from codex_proxy.upstream.http import room_in
from codex_proxy.upstream.provider import (
    DISABLED_SECONDS,
    FAILED_CHECKS,
    LACKING_SECONDS,
    STATES,
    Check,
    Provider,
    Way,
)

ALL = ("responses", "chat", "completions", "engines", "edits", "embeddings", "messages")


def provider(*models: Any, capabilities: tuple[str, ...] = ALL, **more: Any) -> Provider:
    said = {"name": "up", "base-url": "http://127.0.0.1:1/v1", "models": list(models), **more}
    return Provider(read_upstream({**said, "capabilities": list(capabilities)}), "config")


def asked(name: str, slug: str = "", capability: str = "chat", **more: Any) -> BackendRequest:
    request = BackendRequest("responses", name, slug or name, b"{}")
    request.native = Native(capability, b"{}", {}, name, stream=False)
    request.native.standard = lambda: request
    for field, value in more.items():
        setattr(request.native, field, value)
    return request


@pytest.mark.parametrize(
    ("models", "capabilities", "request_", "way"),
    [
        # All models, its own dialect.
        ((), ALL, asked("m"), Way(True, "m", "chat")),
        # Another dialect: translated.
        ((), ("responses",), asked("m"), Way(False, "m", "responses")),
        ((), ("messages",), asked("m"), None),
        # By name, by pattern, renamed; letters count the same in either case.
        (("m",), ALL, asked("M"), Way(True, "M", "chat")),
        (("m",), ALL, asked("n"), None),
        (("m*",), ALL, asked("my"), Way(True, "my", "chat")),
        (({"m*": "theirs"},), ALL, asked("my"), Way(True, "theirs", "chat")),
        (({"m*": "wide"}, {"my": "exact"}, {"myth*": "long"}), ALL, asked("my"), Way(True, "exact", "chat")),
        (({"m*": "wide"}, {"my*": "long"}), ALL, asked("myth"), Way(True, "long", "chat")),
        # A suffix of ours is nobody's model: under its own name, with the effort in the body.
        ((), ALL, asked("gpt-5.5-high", "gpt-5.5"), Way(False, "gpt-5.5", "responses")),
        (("gpt-5*",), ALL, asked("gpt-5.5-high", "gpt-5.5"), Way(False, "gpt-5.5", "responses")),
        # But for who lists just that name, and where nothing else is spoken.
        (("gpt-5.5-high",), ALL, asked("gpt-5.5-high", "gpt-5.5"), Way(True, "gpt-5.5-high", "chat")),
        ((), ("chat",), asked("gpt-5.5-high", "gpt-5.5"), Way(True, "gpt-5.5-high", "chat")),
        # What stands for another model here is a model of its own there.
        ((), ("messages",), asked("claude-x", "gpt-5.5", "messages"), Way(True, "claude-x", "messages")),
        ((), ("responses",), asked("claude-x", "gpt-5.5", "messages"), Way(False, "gpt-5.5", "responses")),
        (
            ("claude-*",),
            ("responses",),
            asked("claude-x", "gpt-5.5", "messages"),
            Way(False, "claude-x", "responses"),
        ),
        # What is not whole goes translated or not at all; so does what cannot be translated the other way.
        ((), ALL, asked("m", capability="responses", is_whole=False), Way(False, "m", "responses")),
        ((), ("chat",), asked("m", capability="responses", is_whole=False), None),
        ((), ("responses",), asked("m", capability="embeddings", standard=None), None),
        ((), ALL, asked("m", capability="embeddings", standard=None), Way(True, "m", "embeddings")),
        ((), ALL, BackendRequest("responses/compact", "m", "m", b"{}"), None),
    ],
)
def test_how_a_request_goes(
    models: tuple[Any, ...], capabilities: tuple[str, ...], request_: BackendRequest, way: Way | None
) -> None:
    assert provider(*models, capabilities=capabilities).way(request_, 0.0) == way
    assert provider(*models, capabilities=capabilities, enabled=False).way(request_, 0.0) is None


def test_what_is_not_there_is_remembered_and_another_way_is_gone() -> None:
    one = provider()
    native = Way(True, "m", "chat")
    assert one.way(asked("m"), 0.0) == native
    one.lack(native, 0.0)
    assert one.way(asked("m"), 1.0) == Way(False, "m", "responses")
    assert one.way(asked("other"), 1.0) == Way(True, "other", "chat")
    one.lack(Way(False, "m", "responses"), 1.0)
    assert one.way(asked("m"), 2.0) is None
    assert one.way(asked("m"), LACKING_SECONDS + 0.5) == native


def check(*, is_ok: bool = False, status: int | None = 200, **more: Any) -> Check:
    return Check(0.0, is_ok, status, 0.1, "words", **more)


def test_a_refused_key_holds_until_a_check_passes() -> None:
    one = provider()
    one.checked(check(is_ok=True))
    assert one.state(0.0) == "healthy"
    assert one.refuse("401", 0.0)
    assert not one.refuse("401", 1.0)
    assert one.blocked("m", 10_000.0) is not None
    one.checked(check(status=500))
    assert one.state(0.0) == "disabled"
    one.checked(check(is_ok=True))
    assert one.blocked("m", 0.0) is None
    # Where no check can tell, it is tried again after a while.
    one.checked(check(status=404, is_inconclusive=True))
    one.refuse("401", 100.0)
    assert one.blocked("m", 100.0 + DISABLED_SECONDS - 1) is not None
    assert one.blocked("m", 100.0 + DISABLED_SECONDS) is None


def test_failed_checks_take_it_out_and_a_good_one_brings_it_back() -> None:
    one = provider()
    for count in range(FAILED_CHECKS):
        assert one.blocked("m", 0.0) is None
        one.checked(check(status=None))
        assert one.state(0.0) == ("ejected" if count + 1 == FAILED_CHECKS else "degraded")
    blocked = one.blocked("m", 0.0)
    assert blocked is not None
    assert blocked.rule == "down"
    one.checked(check(is_ok=True))
    assert one.blocked("m", 0.0) is None


def test_rests_are_of_a_model_or_of_all_and_only_grow() -> None:
    one = provider()
    one.rest("m", 10.0, "why", 0.0)
    one.rest("m", 2.0, "why", 1.0)
    assert one.blocked("m", 9.0) is not None
    assert one.blocked("n", 9.0) is None
    assert one.blocked("m", 10.0) is None
    assert one.state(9.0) == "degraded"
    one.rest("", 5.0, "no money", 20.0)
    assert one.blocked("n", 24.0) is not None


def test_names_that_callers_make_up_take_bounded_room() -> None:
    one = provider()
    for number in range(2_000):
        one.outlier(f"m{number}").bad(0.0)
        one.lack(Way(True, f"m{number}", "chat"), 0.0)
        one.rest(f"m{number}", 60.0, "why", 0.0)
    assert len(one.outliers) <= 201
    assert len(one.lacks) <= 200
    assert len(one.rests) <= 201


def test_its_models_are_those_it_was_given_or_lists() -> None:
    one = provider("a", "gpt-*", {"mine": "theirs"})
    assert one.listed() == ["a", "mine"]
    one.checked(check(is_ok=True, models=("gpt-1", "other", "gpt-2")))
    assert one.listed() == ["a", "gpt-1", "gpt-2", "mine"]
    assert [one.serves(name) for name in ("a", "gpt-9", "theirs", "mine", "x")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    every = provider()
    every.checked(check(is_ok=True, models=("b", "a")))
    assert every.listed() == ["b", "a"]


def test_whatever_happens_it_is_in_a_known_state_and_recovers() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        one, now = provider(), 0.0
        for _ in range(200):
            now += rng.choice((0.0, 1.0, 20.0))
            match rng.randrange(6):
                case 0:
                    outlier = one.outlier("m")
                    if outlier.bad(now):
                        outlier.eject(now)
                case 1:
                    one.outlier("m").good(now)
                case 2:
                    one.rest(rng.choice(("", "m")), rng.uniform(0, 100), "why", now)
                case 3:
                    one.refuse("why", now)
                case _:
                    one.checked(check(is_ok=rng.random() < 0.5, status=rng.choice((200, 500, 401, None))))
            assert one.state(now) in STATES
        one.checked(check(is_ok=True))
        now += 10 * BASE_SECONDS + 300
        one.outlier("m").good(now)
        assert one.blocked("m", now) is None
        assert one.state(now) == "healthy"


# -- what its owner says -----------------------------------------------------------------


def test_the_least_that_is_needed_and_what_it_means() -> None:
    assert read_upstream({"name": "a", "base-url": "https://a.test/v1/v1/"}) == Upstream(
        "a", "https://a.test"
    )


@pytest.mark.parametrize(
    ("said", "field", "words"),
    [
        ({"name": ""}, "name", "missing"),
        ({"name": "a b"}, "name", "'a b'"),
        ({"base-url": "ftp://x"}, "base-url", "http"),
        ({"base-url": "http://user:secret@x"}, "base-url", "user"),
        ({"base-url": "http://169.254.169.254"}, "base-url", "link-local"),
        ({"base-url": "http://[::ffff:100.100.100.200]/v1"}, "base-url", "metadata"),
        ({"base-url": "http://metadata.google.internal"}, "base-url", "metadata"),
        ({"api-key": "a secret"}, "api-key", "***"),
        ({"api-key": "secret", "api-key-env": "X"}, "api-key-env", "only one"),
        ({"priority": 1.5}, "priority", "1.5"),
        ({"weight": 0}, "weight", "0"),
        ({"weight": "much"}, "weight", "'much'"),
        ({"max-retries": -1}, "max-retries", "-1"),
        ({"timeout": 0}, "timeout", "0"),
        ({"enabled": "perhaps"}, "enabled", "'perhaps'"),
        ({"models": ["a b"]}, "models", "a b"),
        ({"models": [{"a": "b*"}]}, "models", "b*"),
        ({"models": ["a", "A"]}, "models", "twice"),
        ({"capabilities": []}, "capabilities", "[]"),
        ({"capabilities": ["talk"]}, "capabilities", "talk"),
        ({"on-client-disconnect": "wait"}, "on-client-disconnect", "wait"),
        ({"base_url": "x"}, "base_url", "none of name, base-url"),
    ],
)
def test_what_does_not_fit_is_named_with_what_would_do(said: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(BadUpstream) as caught:
        read_upstream({"name": "a", "base-url": "https://a.test", **said})
    assert caught.value.field == field
    assert words in caught.value.message
    assert "secret" not in caught.value.message


def test_a_key_is_shown_nowhere() -> None:
    one = Provider(Upstream("a", "https://a.test", "sk-canary"), "config")
    assert "canary" not in repr(one)
    assert masked_upstream(one.definition)["api-key"] == "***"


# -- when there is room again ------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "6m0s"}, 360.0),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2.5s"}, 62.5),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "6m0s"}, None),
        ({"x-ratelimit-reset": "1800000007"}, 7.0),
        ({"x-ratelimit-reset": "7"}, 7.0),
        (
            {
                "anthropic-ratelimit-tokens-remaining": "0",
                "anthropic-ratelimit-tokens-reset": "2027-01-15T08:00:09Z",
            },
            9.0,
        ),
        ({"x-ratelimit-reset": "soon"}, None),
        ({"x-ratelimit-reset": "9" * 400}, None),
        ({"x-ratelimit-reset": ""}, None),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "2s",
                "x-ratelimit-remaining-tokens": "0",
                "x-ratelimit-reset-tokens": "500ms",
            },
            2.0,
        ),
    ],
)
def test_when_there_is_room_again(headers: dict[str, str], seconds: float | None) -> None:
    assert room_in(headers, 1_800_000_000.0) == (
        None if seconds is None else pytest.approx(seconds, abs=0.01)
    )
