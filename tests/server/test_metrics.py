"""What a scrape says, how much of it callers can make, and what it costs."""

import asyncio
import time

import pytest
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from codex_proxy.accounts.pool import Pool
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.server.metrics import Metrics, Sources
from codex_proxy.server.tally import OTHER, Tally
from codex_proxy.tasks import Background
from codex_proxy.trace import Attempt, Caller, End, Trace, Usage, UsageSource
from tests.accounts.making import NOW, make_pool
from tests.accounts.test_many import many

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Work:
    in_flight = 3
    streams = 2
    retrying = 1


def parse_openmetrics(text: str) -> list[Metric]:
    return list(openmetrics.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]


def tally() -> Tally:
    catalog = Catalog()
    return Tally(lambda: catalog)


def turn(
    *attempts: tuple[str, str],
    model: str = "gpt-5.5",
    caller: str = "laptop",
    end: End = End.COMPLETED,
    status: int = 200,
    first: float | None = 0.4,
    seconds: float = 2.0,
) -> Trace:
    trace = Trace(
        "req_1", "chat", Caller("key-1", caller), 100.0, NOW, model=model, client="codex", status=status
    )
    trace.attempts += [Attempt(alias, 100.0, outcome) for alias, outcome in attempts]
    trace.usage = Usage(100, 60, 0, 20, 5, UsageSource.BACKEND)
    trace.first_event = None if first is None else 100.0 + first
    trace.finish(end, 100.0 + seconds)
    return trace


def metrics(counted: Tally, pool: Pool, sources: Sources | None = None) -> Metrics:
    return Metrics(
        counted,
        pool,
        Work(),
        Background(),
        sources if sources is not None else Sources(phase=lambda: "ready"),
        live=Live(Settings()),
        clock=ManualClock(NOW),
    )


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text)
        for sample in family.samples
    }


async def scraped(counted: Tally, pool: Pool | None = None, sources: Sources | None = None) -> Samples:
    shown = metrics(counted, pool if pool is not None else make_pool()[0], sources)
    return samples((await shown.render(generate_latest)).decode())


def value(found: Samples, name: str, **labels: str) -> float | None:
    return found.get((f"codex_proxy_{name}", tuple(sorted(labels.items()))))


# --- turns


async def test_a_turn_is_counted_in_all_its_parts() -> None:
    counted = tally()
    counted.note(turn(("a", "server"), ("b", "ok")))
    counted.note(turn(("b", "exhausted"), end=End.FAILED, status=429, first=None, seconds=0.2))
    found = await scraped(counted)
    assert value(found, "requests_total", route="chat", outcome="completed", status="2xx") == 1
    assert value(found, "requests_total", route="chat", outcome="failed", status="429") == 1
    assert value(found, "client_requests_total", client="codex") == 2
    assert value(found, "attempts_total", account="a", outcome="server") == 1
    assert value(found, "attempts_total", account="b", outcome="ok") == 1
    assert value(found, "attempts_total", account="b", outcome="exhausted") == 1
    assert value(found, "retries_total", after="server") == 1
    assert value(found, "tokens_total", model="gpt-5.5", kind="input") == 200
    assert value(found, "tokens_total", model="gpt-5.5", kind="cached") == 120
    assert value(found, "tokens_total", model="gpt-5.5", kind="reasoning") == 10
    assert value(found, "caller_requests_total", caller="laptop") == 2
    assert value(found, "caller_tokens_total", caller="laptop", kind="output") == 40
    assert value(found, "first_token_seconds_count", model="gpt-5.5") == 1
    assert value(found, "first_token_seconds_bucket", model="gpt-5.5", le="0.3") == 0
    assert value(found, "first_token_seconds_bucket", model="gpt-5.5", le="0.5") == 1
    assert value(found, "request_duration_seconds_bucket", route="chat", le="0.25") == 1
    assert value(found, "request_duration_seconds_bucket", route="chat", le="+Inf") == 2
    assert value(found, "request_duration_seconds_sum", route="chat") == pytest.approx(2.2)


@pytest.mark.parametrize(
    ("status", "shown"), [(0, "none"), (200, "2xx"), (404, "4xx"), (429, "429"), (503, "5xx"), (529, "5xx")]
)
async def test_a_status_is_told_by_its_class(status: int, shown: str) -> None:
    counted = tally()
    counted.note(turn(end=End.FAILED, status=status))
    assert value(await scraped(counted), "requests_total", route="chat", outcome="failed", status=shown) == 1


async def test_what_is_under_way_and_what_others_count() -> None:
    counted = tally()
    counted.lag.add(0.02)
    sources = Sources(
        phase=lambda: "draining",
        sockets=lambda: 4,
        refreshes=lambda: {"ok": 7, "passing": 1},
        reloads=lambda: {"applied": 2, "broken": 0},
        dropped_records=lambda: 5,
        firing=lambda: {"error-share": 1},
        messages=lambda: {("slack-1", "sent"): 3},
        traces=lambda: {"sent": 9},
    )
    found = await scraped(counted, sources=sources)
    assert value(found, "requests_in_flight") == 3
    assert value(found, "streams_in_flight") == 2
    assert value(found, "retries_in_flight") == 1
    assert value(found, "queue_length") == 0
    assert value(found, "websockets_open") == 4
    assert value(found, "phase", phase="draining") == 1
    assert value(found, "phase", phase="ready") == 0
    assert value(found, "token_refreshes_total", result="ok") == 7
    assert value(found, "config_reloads_total", result="applied") == 2
    assert value(found, "dropped_records_total") == 5
    assert value(found, "alerts_firing", alert="error-share") == 1
    assert value(found, "alert_messages_total", webhook="slack-1", result="sent") == 3
    assert value(found, "telemetry_turns_total", result="sent") == 9
    assert value(found, "loop_lag_seconds_bucket", le="0.01") == 0
    assert value(found, "loop_lag_seconds_bucket", le="0.025") == 1
    assert ("process_open_fds", ()) in found
    assert ("python_gc_collections_total", (("generation", "0"),)) in found


# --- names that callers choose


async def test_only_models_that_are_served_have_a_name() -> None:
    counted = tally()
    for name in (
        "gpt-5.5-high",
        "gpt-5.5(low)",
        "no-such-model",
        "",
        "x" * 100_000,
        "a\n} 1\ncodex_proxy_forged 1",
    ):
        counted.note(turn(model=name))
    found = await scraped(counted)
    assert value(found, "tokens_total", model="gpt-5.5", kind="output") == 40
    assert value(found, "tokens_total", model=OTHER, kind="output") == 80
    assert ("codex_proxy_forged", ()) not in found


async def test_made_up_models_fill_nothing() -> None:
    counted = tally()
    for number in range(5_000):
        counted.note(turn(model=f"gpt-{number}-nobody"))
    assert set(counted.models) == set(counted.firsts) == {OTHER}
    assert len(counted._model_names) <= 1_000


async def test_a_model_that_comes_later_gets_its_name() -> None:
    lists: list[list[dict[str, object]]] = [[{"slug": "gpt-5.5"}]]
    catalogs = [Catalog(lists=lists)]
    counted = Tally(lambda: catalogs[-1])
    counted.note(turn(model="gpt-9-nova"))
    assert set(counted.models) == {OTHER}
    catalogs.append(Catalog(lists=[[{"slug": "gpt-5.5"}, {"slug": "gpt-9-nova"}]]))
    await scraped(counted)
    counted.note(turn(model="gpt-9-nova"))
    assert set(counted.models) == {OTHER, "gpt-9-nova"}


async def test_callers_are_bounded_and_their_addresses_masked() -> None:
    counted = tally()
    counted.note(turn(caller="jane.doe@example.com"))
    for number in range(500):
        counted.note(turn(caller=f"key-{number}"))
    found = await scraped(counted)
    callers = {
        dict(labels)["caller"] for name, labels in found if name == "codex_proxy_caller_requests_total"
    }
    assert len(callers) == 101
    assert value(found, "caller_requests_total", caller=OTHER) == 401
    assert not any("jane" in caller or "example.com" in caller for caller in callers)


async def test_accounts_that_came_and_went_do_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("codex_proxy.server.tally._MAX_ATTEMPTS", 10)
    counted = tally()
    for number in range(100):
        counted.note(turn((f"acct-{number}", "ok")))
    assert len(counted.attempts) == 11
    assert counted.attempts[OTHER, "ok"] == 90


async def test_a_name_cannot_break_out_of_its_label() -> None:
    pool, _ = make_pool()
    counted = tally()
    counted.note(turn(('a"} 1\n\\', "ok"), caller='k"\\'))
    found = await scraped(counted, pool)
    assert value(found, "attempts_total", account='a"} 1\n\\', outcome="ok") == 1
    assert value(found, "caller_requests_total", caller='k"\\') == 1


# --- accounts


async def test_an_account_has_one_status_and_its_windows() -> None:
    pool, _ = many(count=3)
    found = await scraped(tally(), pool)
    for account in pool:
        mine = [
            (dict(labels)["status"], number)
            for (name, labels), number in found.items()
            if name == "codex_proxy_account_status" and dict(labels)["account"] == account.alias
        ]
        assert len(mine) == 5
        assert [status for status, number in mine if number] == ["active"]
        window = account.quota.families["codex"].primary
        assert window is not None
        labels = {"account": account.alias, "limit": "codex", "window": "5h"}
        assert value(found, "account_quota_used_ratio", **labels) == pytest.approx(window.used_percent / 100)
        assert value(found, "account_quota_reset_timestamp_seconds", **labels) == window.resets_at
        assert value(found, "account_quota_age_seconds", **labels) == 0
    assert value(found, "accounts", status="active") == 3
    assert value(found, "pool_quota_used_ratio", window="5h") is not None


async def test_a_window_that_is_over_has_an_age_and_no_use() -> None:
    """Unknown is not empty."""
    pool, _ = many(count=1)
    shown = metrics(tally(), pool)
    shown._clock.advance(30_000.0)  # type: ignore[attr-defined]
    found = samples((await shown.render(generate_latest)).decode())
    (account,) = pool
    labels = {"account": account.alias, "limit": "codex", "window": "5h"}
    assert value(found, "account_quota_age_seconds", **labels) == 30_000
    assert value(found, "account_quota_used_ratio", **labels) is None
    assert value(found, "account_quota_reset_timestamp_seconds", **labels) is None


async def test_openmetrics_is_given_to_whom_asks_for_it() -> None:
    counted = tally()
    counted.note(turn(("a", "ok")))
    pool, _ = many(count=2)
    encode, content_type = choose_encoder(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    text = (await metrics(counted, pool).render(encode)).decode()
    assert text.endswith("# EOF\n")
    assert text.count("# EOF") == 1
    # The parser is strict: order, types, suffixes.
    names = {family.name for family in parse_openmetrics(text)}
    assert {"codex_proxy_requests", "codex_proxy_attempts", "codex_proxy_account_status"} <= names


async def test_both_formats_say_the_same() -> None:
    counted = tally()
    counted.note(turn(("a", "ok")))
    pool, _ = many(count=2)
    shown = metrics(counted, pool)
    plain = samples((await shown.render(generate_latest)).decode())
    open_text = (await shown.render(choose_encoder(OPENMETRICS)[0])).decode()
    other = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_openmetrics(open_text)
        for sample in family.samples
    }
    ours = {key for key in plain if key[0].startswith("codex_proxy_")}
    assert ours == {key for key in other if key[0].startswith("codex_proxy_")}
    assert all(plain[key] == other[key] for key in ours)


# --- cost


async def test_a_scrape_of_many_accounts_does_not_hold_the_loop() -> None:
    """Loose bounds, because the machine does other things: it is 6 ms for 200, and 3 ms at a time for 2,000."""
    pool, _ = many()
    shown = metrics(tally(), pool)
    await shown.render(generate_latest)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.get_running_loop().create_task(count())
    await shown.render(generate_latest)
    counting.cancel()
    assert turns >= len(pool) // 50

    few, _ = many(count=200)
    shown = metrics(tally(), few)
    await shown.render(generate_latest)
    best = 1.0
    for _ in range(5):
        begun = time.process_time()
        await shown.render(generate_latest)
        best = min(best, time.process_time() - begun)
    assert best < 0.02


def test_nothing_is_held_of_a_turn() -> None:
    counted, one = tally(), turn(("a", "ok"))
    for _ in range(1_000):
        counted.note(one)
    assert len(counted.requests) == len(counted.attempts) == len(counted.durations) == 1
