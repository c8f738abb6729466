"""The order of accounts and upstreams: who is asked, who is passed over, and what is said when nobody can serve."""

import random
from collections.abc import Collection
from typing import Any, cast

import pytest

from codex_proxy.accounts.affinity import Origins
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings, read_upstream
from codex_proxy.errors import (
    BackendFault,
    ConfigError,
    PoolBusy,
    PoolEmpty,
    PoolExhausted,
    PoolShortage,
    ProxyError,
    RequestError,
    UpstreamError,
    Verdict,
)
from codex_proxy.net import Outbound
from codex_proxy.protocol.binding import Binding
from codex_proxy.protocol.native import Native
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.tasks import Background
from codex_proxy.upstream.backend import AccountRoute
from codex_proxy.upstream.ejection import BASE_SECONDS, CONSECUTIVE
from codex_proxy.upstream.provider import Check
from codex_proxy.upstream.providers import Providers
from codex_proxy.upstream.route import Lease
from codex_proxy.upstream.routing import MergedRoute


class Accounts:
    """The accounts, played: they serve, or say why not."""

    def __init__(self) -> None:
        self.says: ProxyError | None = None
        self.are_there = True
        self.history: set[str] = set()

    def pick(self, request: BackendRequest, tried: Collection[str]) -> Lease:
        if self.says is not None:
            raise self.says
        if "acc" in tried:
            raise PoolShortage("tried", retry_after=1.0)
        return cast("Lease", _Account())

    def has_written(self, compacted: str) -> bool:
        return compacted in self.history

    def limits(self) -> None:
        return None


class _Account:
    key = alias = "acc"
    upstream = ""


class Stage:
    """A route over played accounts and upstreams that are never called."""

    def __init__(self, *said: dict[str, Any], **settings: Any) -> None:
        self.clock = ManualClock()
        self.live = Live(Settings(**settings))
        self.accounts = Accounts()
        self.providers = Providers(
            live=self.live,
            clock=self.clock,
            background=Background(),
            outbound=cast("Outbound", None),
            origins=Origins(),
            rng=random.Random(1),
        )
        definitions = [
            read_upstream({"base-url": "http://127.0.0.1:1", "capabilities": ["responses", "chat"], **one})
            for one in said
        ]
        self.providers.replace(definitions, source="config")
        self.route = MergedRoute(
            cast("AccountRoute", self.accounts), self.providers, live=self.live, clock=self.clock
        )

    def pick(self, request: BackendRequest | None = None, tried: Collection[str] = ()) -> Lease:
        return self.route.pick(request or asked(), tried)

    def fail(self, name: str, verdict: Verdict = Verdict.SERVER, times: int = 1, **fields: Any) -> None:
        """Have requests fail on an upstream."""
        for _ in range(times):
            lease = self.pick(tried={one.key for one in self.providers.all() if one.name != name} | {"acc"})
            assert lease.alias == name
            lease.failed(UpstreamError(verdict, BackendFault("words"), **fields))
            lease.release()


def asked(session: str = "conv", *, model: str = "m", **more: Any) -> BackendRequest:
    request = BackendRequest("responses", model, model, b"{}", binding=Binding(session, "prompt_cache_key"))
    request.native = Native("chat", b"{}", {}, model, stream=False)
    request.native.standard = lambda: request
    for name, value in more.items():
        setattr(request, name, value)
    return request


A, B, C = ({"name": name} for name in "abc")


def test_small_priorities_come_first_and_accounts_are_one_of_them() -> None:
    stage = Stage({**A, "priority": 5}, {**B, "priority": -5}, C)
    order = []
    tried: set[str] = set()
    for _ in range(4):
        lease = stage.pick(tried=tried)
        order.append(lease.alias)
        tried.add(lease.key)
    assert order == ["b", "acc", "a", "c"]
    stage = Stage(A, accounts_priority=11)
    assert stage.pick().alias == "a"


def test_who_was_passed_over_and_why_is_told() -> None:
    stage = Stage({**A, "priority": -2}, {**B, "priority": -1}, C)
    stage.accounts.says = PoolExhausted("used up", resets_at=9e9, retry_after=60.0)
    stage.fail("a", Verdict.LIMITED, retry_after=30.0)
    decision = stage.pick(tried={"upstream:b"}).decision
    assert (decision.alias, decision.rule, decision.strategy) == ("c", "failover", "upstreams")
    assert [(one.alias, one.rule) for one in decision.excluded] == [
        ("a", "resting"),
        ("b", "tried"),
        ("accounts", "usage_limit_reached"),
    ]
    assert [one.alias for one in decision.candidates] == ["a", "b", "accounts", "c"]


def test_conversations_of_one_priority_are_shared_by_weight_and_stay() -> None:
    stage = Stage({**A, "priority": 0, "weight": 2}, {**B, "priority": 0})
    homes = {f"c{n}": stage.pick(asked(f"c{n}")).alias for n in range(2_000)}
    counts = {name: sum(home == name for home in homes.values()) for name in ("a", "b", "acc")}
    assert counts["a"] == pytest.approx(1_000, abs=120)
    assert counts["b"] == pytest.approx(500, abs=100)
    assert all(stage.pick(asked(session)).alias == home for session, home in homes.items())


def test_a_conversation_that_gets_another_name_stays_where_it_was() -> None:
    stage = Stage({**A, "priority": 0}, {**B, "priority": 0}, {**C, "priority": 0})
    for number in range(50):
        request = asked(f"opening{number}")
        request.binding = Binding(f"opening{number}", "beginning", is_opening=True, also=f"chain{number}")
        home = stage.pick(request).alias
        for _ in range(3):
            assert stage.pick(asked(f"chain{number}")).alias == home
        # When it had to move, it stays where it went.
        if home != "acc":
            moved = stage.pick(asked(f"chain{number}"), tried={f"upstream:{home}"}).alias
            assert stage.pick(asked(f"chain{number}")).alias == moved
    assert len(stage.route._chains) <= 50


def test_five_failures_eject_one_probe_is_let_through_and_an_answer_brings_it_back() -> None:
    stage = Stage({**A, "priority": -1}, B)
    stage.fail("a", times=CONSECUTIVE)
    assert stage.pick().alias == "acc"
    stage.clock.advance(BASE_SECONDS)
    probe = stage.pick()
    assert (probe.alias, probe.decision.rule) == ("a", "probe")
    assert stage.pick().alias == "acc"
    # Its caller leaves: the probe has told nothing, and another one goes.
    probe.release()
    probe = stage.pick()
    assert probe.alias == "a"
    probe.ok()
    probe.release()
    assert stage.pick().decision.rule == "order"


def test_a_failed_probe_ejects_it_for_longer() -> None:
    stage = Stage({**A, "priority": -1}, B)
    stage.fail("a", times=CONSECUTIVE)
    stage.clock.advance(BASE_SECONDS)
    stage.fail("a")
    stage.clock.advance(2 * BASE_SECONDS - 1)
    assert stage.pick().alias == "acc"
    stage.clock.advance(1)
    assert stage.pick().alias == "a"


def test_a_model_is_ejected_and_not_the_others() -> None:
    stage = Stage({**A, "priority": -1}, B)
    stage.fail("a", times=CONSECUTIVE)
    assert stage.pick(asked(model="other")).alias == "a"


def test_never_more_than_half_are_ejected_and_the_least_bad_serves_when_nobody_else_can() -> None:
    stage = Stage(A, B)
    stage.accounts.says = PoolEmpty("no account")
    stage.fail("a", times=CONSECUTIVE)
    stage.fail("b", times=3 * CONSECUTIVE)
    # It is not ejected, for the other one is.
    lease = stage.pick()
    assert (lease.alias, lease.decision.rule) == ("b", "failover")
    panic = stage.pick(tried={"upstream:b"})
    assert (panic.alias, panic.decision.rule) == ("a", "least bad")
    lone = Stage(A)
    lone.accounts.says = PoolEmpty("no account")
    lone.fail("a", times=CONSECUTIVE)
    assert lone.pick().decision.rule == "least bad"


def test_a_callers_fault_counts_for_nothing() -> None:
    stage = Stage({**A, "priority": -1})
    stage.fail("a", Verdict.CALLER, times=50)
    stage.fail("a", Verdict.ENCRYPTED, times=50)
    assert stage.pick().alias == "a"
    assert stage.providers.state()[0]["errors"] == 0


def test_what_each_failure_means() -> None:
    stage = Stage({**A, "priority": -1})
    stage.fail("a", Verdict.LIMITED, retry_after=7.0)
    assert stage.pick().alias == "acc"
    stage.clock.advance(7.0)
    assert stage.pick().alias == "a"
    stage.fail("a", Verdict.UNENTITLED)
    assert stage.pick(asked(model="any")).alias == "acc"
    stage.clock.advance(60.0)
    assert stage.pick().alias == "a"
    stage.fail("a", Verdict.MODEL, status=404)
    # What is not there in its own dialect is asked in the other one.
    assert stage.pick().decision.rule == "order, translated"
    stage.fail("a", Verdict.UNAUTHORIZED, status=401)
    stage.clock.advance(200.0)
    assert stage.pick().alias == "acc"
    stage.providers.get("a").checked(Check(0.0, True, 200, 0.1, "well"))  # type: ignore[union-attr]
    assert stage.pick().alias == "a"


def told(stage: Stage, tried: Collection[str] = (), request: BackendRequest | None = None) -> ProxyError:
    with pytest.raises(ProxyError) as caught:
        stage.pick(request, tried)
    return caught.value


def test_what_is_said_when_nobody_can_serve() -> None:
    stage = Stage(A)
    stage.accounts.says = PoolEmpty("no account")
    error = told(stage, {"upstream:a"})
    assert isinstance(error, PoolShortage)
    assert error.retry_after == 0.5
    stage.fail("a", Verdict.LIMITED, retry_after=40.0)
    error = told(stage)
    assert isinstance(error, PoolShortage)
    assert error.retry_after == 40.0
    assert error.decision is not None
    # The accounts will be back earlier, or later.
    stage.accounts.says = PoolExhausted("used up", resets_at=1.0, retry_after=20.0)
    assert told(stage) is stage.accounts.says
    stage.accounts.says = PoolExhausted("used up", resets_at=1.0, retry_after=90.0)
    error = told(stage)
    assert isinstance(error, PoolShortage)
    assert error.retry_after == 40.0
    # Only a person can help.
    stage = Stage(A)
    stage.accounts.says = PoolEmpty("no account")
    stage.fail("a", Verdict.UNAUTHORIZED, status=401)
    assert isinstance(told(stage), PoolEmpty)


def test_an_account_on_trial_is_waited_for() -> None:
    stage = Stage(A)
    stage.accounts.says = PoolBusy("on trial", patience=10.0)
    assert told(stage) is stage.accounts.says
    stage.accounts.says = PoolBusy("full")
    assert stage.pick().alias == "a"
    # Where nobody else can serve, there is a queue.
    assert told(stage, {"upstream:a"}) is stage.accounts.says


def test_what_no_upstream_takes_is_the_accounts_matter() -> None:
    stage = Stage({**A, "models": ["other"], "priority": -1})
    assert stage.pick().alias == "acc"
    stage.accounts.says = RequestError("no such model", param="model")
    assert told(stage) is stage.accounts.says
    refused = asked()
    assert refused.native is not None
    refused.native.refusal = RequestError("n must be 1", param="n")
    assert told(stage, request=refused) is refused.native.refusal
    # And what no account takes goes to upstreams alone.
    stage = Stage(A)
    assert stage.pick(refused).alias == "a"
    assert isinstance(told(stage, {"upstream:a"}, refused), PoolShortage)


def test_a_model_that_nobody_has_is_the_callers_matter() -> None:
    stage = Stage({**A, "models": ["x", "y"]})
    stage.accounts.are_there = False
    error = told(stage)
    assert isinstance(error, RequestError)
    assert (error.status, error.code) == (400, "model_not_found")
    assert "'m' is not available here: no upstream serves it; they serve: x, y" in error.message
    stage = Stage({**A, "enabled": False})
    stage.accounts.are_there = False
    assert isinstance(told(stage), PoolEmpty)


def test_history_that_an_account_wrote_goes_to_no_upstream() -> None:
    stage = Stage({**A, "priority": -1})
    stage.accounts.history = {"sealed"}
    assert stage.pick(asked(compacted=("sealed",))).alias == "acc"
    assert stage.pick(asked(compacted=("another",))).alias == "a"


def test_a_turn_goes_back_to_the_upstream_that_gave_it_its_state() -> None:
    stage = Stage({**A, "priority": 0}, {**B, "priority": 0}, {**C, "priority": 0})
    for one in stage.providers.all():
        lease = stage.pick(asked(turn_state=f"{one.tag}.raw"))
        assert lease.alias == one.name
        assert lease.wrap_turn_state("raw") == f"{one.tag}.raw"


# -- which there are ---------------------------------------------------------------------


def test_what_is_known_of_an_unchanged_one_stays_and_a_new_key_begins_anew() -> None:
    stage = Stage({**A, "api-key": "k1"}, B)
    registry = stage.providers
    stage.fail("a", Verdict.UNAUTHORIZED, status=401)
    one, other = registry.all()
    registry.replace([one.definition, other.definition], source="config")
    assert registry.all() == [one, other]
    assert one.refused
    changed = read_upstream({**A, "base-url": "http://127.0.0.1:1", "api-key": "k1", "weight": 3})
    registry.replace([changed, other.definition], source="config")
    assert registry.get("a") is one
    # Whoever changes it means that it is right now.
    assert not one.refused
    assert one.requests == 1
    renewed = read_upstream({**A, "base-url": "http://127.0.0.1:1", "api-key": "k2"})
    registry.replace([renewed], source="config")
    assert registry.get("a") is not one
    assert registry.get("b") is None


def test_two_of_one_name_are_an_error_and_the_configuration_wins() -> None:
    stage = Stage(A)
    registry = stage.providers
    definition = registry.all()[0].definition
    for several in ([definition], [read_upstream({**B, "base-url": "http://h"})] * 2):
        with pytest.raises(ConfigError, match="each needs a name of its own"):
            registry.replace(several, source="database")
    registry.replace([read_upstream({**B, "base-url": "http://h"})], source="database")
    assert [(one.name, one.source) for one in registry.all()] == [("a", "config"), ("b", "database")]
    assert [one["is_read_only"] for one in registry.state()] == [True, False]
    registry.replace([definition, read_upstream({**B, "base-url": "http://other"})], source="config")
    assert [(one.name, one.source) for one in registry.all()] == [("a", "config"), ("b", "config")]
