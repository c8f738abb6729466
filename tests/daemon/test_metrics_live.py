"""`/metrics` of a daemon that has served turns: who may read it, and that dashboard and alert rules fit it."""

import asyncio
import json
import re
import shutil
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse

from codex_proxy.simulator import Script
from codex_proxy.simulator.upstream import SimUpstream
from tests.daemon.sockets import line
from tests.daemon.upstreams import entry
from tests.harness import Stand, standing

ROOT = Path(__file__).parent.parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "codex-proxy.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"

# What a scrape adds to every series by itself.
OF_THE_SCRAPE = {"job", "instance"}


@asynccontextmanager
async def having_served(folder: Path) -> AsyncIterator[Stand]:
    """Start a daemon and have turns of every kind served: streamed, collected, retried, refused."""
    async with (
        SimUpstream() as upstream,
        standing(
            folder,
            max_retry=1,
            ledger="personal",
            upstreams=json.dumps([entry(upstream, capabilities=["embeddings"])]),
        ) as stand,
    ):
        await stand.post("/v1/embeddings", {"model": "text-embedding-3-small", "input": "hi"})
        await stand.ask(codex=True)
        await stand.ask(stream=False)
        await stand.post(
            "/v1/chat/completions", {"model": "gpt-5.5", "messages": [{"role": "user", "content": "hi"}]}
        )
        async with line(stand) as caller:
            await caller.complete("hi")
        stand.in_order()
        stand.accounts[0].set("server_error", times=1)
        await stand.ask()
        assert (await stand.post(body={"model": "gpt-5.5", "input": 3})).status == 400
        await stand.post("/refresh")
        await asyncio.sleep(0.3)
        await stand.idle()
        yield stand


@dataclass(slots=True, frozen=True)
class Scraped:
    """What a daemon that has served said, and what it must not say."""

    text: str
    secrets: tuple[str, ...]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Scraped:
    """Scrape once for all who only read."""

    async def scrape() -> Scraped:
        async with having_served(tmp_path_factory.mktemp("served")) as stand:
            answer = await stand.get("/metrics")
            assert answer.status == 200
            secrets = [secret for one in stand.accounts for secret in (one.email, one.account_id, "eyJ")]
            return Scraped(answer.body.decode(), tuple(secrets))

    return asyncio.run(scrape())


def names_in(text: str) -> dict[str, set[frozenset[str]]]:
    """Return the names of all samples, each with the sets of labels that it has."""
    found: dict[str, set[frozenset[str]]] = defaultdict(set)
    for family in parse(text):
        for sample in family.samples:
            found[sample.name].add(frozenset(sample.labels))
        if not family.samples:
            found[f"{family.name}_total" if family.type == "counter" else family.name].add(frozenset())
    return found


# --- who may read it


async def test_it_opens_with_a_key_or_for_everyone_or_not_at_all(tmp_path: Path) -> None:
    async with standing(tmp_path, api_keys="[first-client-key]") as stand:
        assert (await stand.get("/metrics")).status == 401
        key = {"Authorization": "Bearer first-client-key"}
        answer = await stand.get("/metrics", headers=key)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        open_text = await stand.get(
            "/metrics", headers={**key, "Accept": "application/openmetrics-text;version=1.0.0"}
        )
        assert open_text.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    for folder, setting, status in (("open", "open", 200), ("off", '"off"', 404)):
        (tmp_path / folder).mkdir()
        async with standing(tmp_path / folder, api_keys="[first-client-key]", metrics=setting) as stand:
            assert (await stand.get("/metrics", headers=key if status == 404 else {})).status == status
            # What a page of another site may not do, it may not do here either.
            page = {"Origin": "https://elsewhere.example"}
            assert (await stand.get("/metrics", headers=page)).status == (403 if status == 200 else 401)


def test_nothing_secret_is_in_it(scraped: Scraped) -> None:
    assert scraped.secrets
    assert [secret for secret in scraped.secrets if secret in scraped.text] == []


def test_it_tells_of_the_turns_that_were_served(scraped: Scraped) -> None:
    text = scraped.text
    assert re.search(
        r'^codex_proxy_requests_total\{outcome="completed",route="chat",status="2xx"\} 1', text, re.MULTILINE
    )
    assert re.search(
        r'^codex_proxy_requests_total\{outcome="failed",route="responses",status="4xx"\} 1',
        text,
        re.MULTILINE,
    )
    assert 'codex_proxy_retries_total{after="server"} 1' in text
    assert re.search(r'^codex_proxy_token_refreshes_total\{result="ok"\} 3', text, re.MULTILINE)
    assert re.search(r"^codex_proxy_loop_lag_seconds_count [1-9]", text, re.MULTILINE)


async def test_a_stream_that_runs_is_in_flight(tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        stand.sim.script(Script.text("one two three"))
        stand.sim.set_all("stall", where="middle")
        async with stand.asking():
            text = (await stand.get("/metrics")).body.decode()
            assert stand.daemon.pulse.now()["streams"] == 1
        assert "codex_proxy_requests_in_flight 1.0" in text
        assert "codex_proxy_streams_in_flight 1.0" in text
        await stand.idle()


async def test_a_turn_that_waits_for_an_account_is_queued(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_concurrency=1) as stand, line(stand):
        stand.sim.set_all("stall", where="middle")
        async with stand.asking():
            waiting = asyncio.get_running_loop().create_task(stand.ask("another one"))
            await stand.until(lambda: stand.daemon.pool.waiting == 1)
            text = (await stand.get("/metrics")).body.decode()
            assert stand.daemon.pulse.now()["queued"] == 1
            stand.sim.set_all("ok")
        assert (await waiting).status == 200
    assert "codex_proxy_queue_length 1.0" in text
    assert "codex_proxy_websockets_open 1.0" in text
    assert "codex_proxy_requests_in_flight 2.0" in text


# --- the guide


def metrics_of_the_guide() -> dict[str, set[str]]:
    """Return the labels that the guide names with each metric; those of one row are of all its metrics."""
    table = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("| metric | labels |")[2]
    found: dict[str, set[str]] = {}
    for row in table.partition("\n\n")[0].splitlines()[2:]:
        names, labels = row.split("|")[1:3]
        found |= {name: set(re.findall(r"`(\w+)`", labels)) for name in re.findall(r"`(\w+)`", names)}
    return found


def test_the_guide_names_every_metric_with_labels_that_it_has(scraped: Scraped) -> None:
    told = {f"codex_proxy_{name}": labels for name, labels in metrics_of_the_guide().items()}
    families = {
        f"{family.name}_total" if family.type == "counter" else family.name: family.samples
        for family in parse(scraped.text)
        if family.name.startswith("codex_proxy_")
    }
    assert told.keys() == families.keys()
    for name, samples in families.items():
        # A bucket's bound is the format's own label.
        assert {label for sample in samples for label in sample.labels} - {"le"} <= told[name], name


# --- dashboard and rules


def expressions_of_dashboard() -> Iterator[tuple[str, str]]:
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in document["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            yield (
                variable["name"],
                re.sub(r"label_values\((.*), (\w+)\)", r"sum by (\2) (\1)", variable["query"]["query"]),
            )
    for annotation in document["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]


def expressions_of_rules() -> Iterator[tuple[str, str]]:
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
            for text in rule["annotations"].values():
                # A name that a text tells to look at is a promise too.
                for name in re.findall(r"codex_proxy_\w+", text):
                    yield rule["alert"], name
                labels = re.findall(r"\$labels\.(\w+)", text)
                if labels:
                    names = re.findall(r"(?:codex_proxy|process|python)_\w+", rule["expr"])
                    yield (
                        rule["alert"],
                        " or ".join(f"sum by ({', '.join(labels)}) ({name})" for name in names),
                    )


EXPRESSIONS = [*expressions_of_dashboard(), *expressions_of_rules()]

_NAME = re.compile(r"\b(?:codex_proxy|process|python_gc)_\w+")
_SELECTOR = re.compile(r"\b((?:codex_proxy|process|python_gc)_\w+)\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring) \(([^)]*)\)")


def complaints(expression: str, known: dict[str, set[frozenset[str]]]) -> list[str]:
    """Return the names and labels in an expression that a scrape does not have."""
    found = [name for name in _NAME.findall(expression) if name not in known]
    for name, matchers in _SELECTOR.findall(expression):
        have = {label for labels in known.get(name, ()) for label in labels} | OF_THE_SCRAPE
        found += [
            f"{name}{{{label}}}" for label in re.findall(r"(\w+)\s*[=!]", matchers) if label not in have
        ]
    have = {label for name in _NAME.findall(expression) for labels in known.get(name, ()) for label in labels}
    for labels in _GROUPING.findall(expression):
        found += [f"by ({one})" for one in re.split(r",\s*", labels) if one not in have | OF_THE_SCRAPE]
    return found


def test_dashboard_and_rules_name_only_what_a_scrape_has(scraped: Scraped) -> None:
    known = names_in(scraped.text)
    # Only told while it is so.
    known["codex_proxy_alerts_firing"] = {frozenset({"alert"})}
    known["codex_proxy_telemetry_turns_total"] = {frozenset({"result"})}
    known["codex_proxy_alert_messages_total"] = {frozenset({"webhook", "result"})}
    wrong = {title: bad for title, expression in EXPRESSIONS if (bad := complaints(expression, known))}
    assert wrong == {}
    assert len(EXPRESSIONS) > 60
    for expression, bad in (
        ("rate(codex_proxy_nothing_total[5m])", ["codex_proxy_nothing_total"]),
        ('codex_proxy_accounts{state="active"}', ["codex_proxy_accounts{state}"]),
        ("sum by (acount) (codex_proxy_account_status)", ["by (acount)"]),
    ):
        assert complaints(expression, known) == bad


def test_every_metric_of_ours_is_shown_somewhere() -> None:
    shown = {name for _, expression in EXPRESSIONS for name in _NAME.findall(expression)}
    for name in (
        "codex_proxy_requests_total",
        "codex_proxy_queue_length",
        "codex_proxy_account_quota_used_ratio",
    ):
        assert name in shown


def test_the_dashboard_has_no_panel_twice_or_outside_its_grid() -> None:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


async def promtool(*arguments: str, fed: bytes | None = None) -> tuple[int, str]:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: it comes with Prometheus")
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await process.communicate(fed)
    assert process.returncode is not None
    return process.returncode, out.decode()


async def test_prometheus_can_read_the_rules_and_the_dashboards_expressions(tmp_path: Path) -> None:
    code, said = await promtool("check", "rules", str(RULES))
    assert code == 0, said
    rules = [
        {
            "record": f"panel:{number}",
            "expr": expression
            .replace("$__rate_interval", "5m")
            .replace("$job", ".*")
            .replace("$instance", ".*"),
        }
        for number, (_, expression) in enumerate(expressions_of_dashboard())
    ]
    file = tmp_path / "panels.yml"
    await asyncio.to_thread(
        file.write_text, yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}), encoding="utf-8"
    )
    code, said = await promtool("check", "rules", "--lint=none", str(file))
    assert code == 0, said


async def test_prometheus_finds_no_fault_with_a_scrape(scraped: Scraped) -> None:
    code, said = await promtool("check", "metrics", fed=scraped.text.encode())
    assert code == 0, said


# Every minute a value; `a+bxn` is n more, each larger by b.
CASES = {
    "CodexProxyPoolNearlyDry": (
        {'codex_proxy_pool_quota_used_ratio{instance="i",window="5h"}': "0.2x20",
         'codex_proxy_pool_quota_used_ratio{instance="i",window="week"}': "0.95x20"},
        {"severity": "warning", "instance": "i"},
    ),
    "CodexProxyAccountNeedsLogin": (
        {'codex_proxy_account_status{account="work",status="needs_login"}': "1x20"},
        {"severity": "warning", "account": "work", "status": "needs_login"},
    ),
    "CodexProxyErrorShare": (
        {'codex_proxy_requests_total{instance="i",outcome="completed",route="chat",status="2xx"}': "0+6x20",
         'codex_proxy_requests_total{instance="i",outcome="failed",route="chat",status="429"}': "0+4x20"},
        {"severity": "warning", "instance": "i"},
    ),
    "CodexProxyRefreshFailing": (
        {'codex_proxy_token_refreshes_total{instance="i",result="ok"}': "7x60",
         'codex_proxy_token_refreshes_total{instance="i",result="passing"}': "0+1x60"},
        {"severity": "warning", "instance": "i"},
    ),
    "CodexProxyNoAccount": (
        {'codex_proxy_accounts{instance="i",status="active"}': "0x20"},
        {"severity": "critical", "instance": "i"},
    ),
    "CodexProxyQueue": (
        {'codex_proxy_queue_length{instance="i"}': "3x20"},
        {"severity": "warning", "instance": "i"},
    ),
}  # fmt: skip

# What must not: the callers' own mistakes, too few turns, exchanges of which one succeeds.
QUIET = {
    "CodexProxyErrorShare": {
        'codex_proxy_requests_total{instance="i",outcome="completed",route="chat",status="2xx"}': "0+6x20",
        'codex_proxy_requests_total{instance="i",outcome="failed",route="chat",status="4xx"}': "0+60x20",
    },
    "CodexProxyRefreshFailing": {
        'codex_proxy_token_refreshes_total{instance="i",result="ok"}': "0+1x60",
        'codex_proxy_token_refreshes_total{instance="i",result="passing"}': "0+1x60",
    },
}


async def test_the_rules_tell_of_what_they_are_for_and_of_nothing_else(tmp_path: Path) -> None:
    def case(alert: str, series: dict[str, str], labels: list[dict[str, str]]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {
                    "eval_time": "18m",
                    "alertname": alert,
                    "exp_alerts": [{"exp_labels": one} for one in labels],
                }
            ],
        }

    tests = [case(alert, series, [labels]) for alert, (series, labels) in CASES.items()]
    tests += [case(alert, series, []) for alert, series in QUIET.items()]
    rules = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    for rule in rules["groups"][0]["rules"]:
        # What people are told is not what is tested here.
        rule.pop("annotations")
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(rules), encoding="utf-8")
    file = tmp_path / "tests.yml"
    file.write_text(
        yaml.safe_dump({"rule_files": ["alerts.yml"], "evaluation_interval": "1m", "tests": tests}),
        encoding="utf-8",
    )
    code, said = await promtool("test", "rules", str(file))
    assert code == 0, said
