"""The gateway's places and the page of a key's holder, as people use them."""

import csv
import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, expect

from codex_proxy.errors import LedgerAway
from tests.browser.desk import DESK, PHONE, Tab, tab
from tests.browser.test_reading import OWN_TEXTS, SAME
from tests.daemon.test_admin_api import ADMIN, UPSTREAM_KEY, Gateway, gateway, upstream

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

# Also sums of dollars, and what a browser writes of a moment.
_SAME = re.compile(rf"{SAME.pattern[:-3]}|[$A-Z]|CSV)*$")

PLACES = ("keys", "users", "usage", "upstreams", "prices", "audit")


@asynccontextmanager
async def owner(browser: Browser, gate: Gateway, place: str, **options: Any) -> AsyncIterator[Tab]:
    """Open a place as the owner."""
    async with visitor(browser, gate, ADMIN, **options) as at:
        await at.page.locator("nav").first.wait_for()
        await at.open(f"gateway/{place}")
        yield at


@asynccontextmanager
async def visitor(browser: Browser, gate: Gateway, key: str, **options: Any) -> AsyncIterator[Tab]:
    async with tab(browser, gate.stand.url, **options) as at:
        await at.page.goto(f"{gate.stand.url}/ui")
        await at.page.locator("#key").fill(key)
        await at.page.keyboard.press("Enter")
        yield at


async def asked(gate: Gateway, made: Any, count: int = 1) -> None:
    """Ask with a key, and wait until it is settled."""
    for number in range(count):
        answer = await gate.stand.ask(
            f"hello {number}", headers={"Authorization": f"Bearer {made['secret']}"}
        )
        assert answer.status == 200
    await gate.usage(count)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def busy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Gateway, Any]]:
    """Make a gateway with something in every place, and a key of it."""
    async with upstream() as url, gateway(tmp_path_factory.mktemp("busy"), records="on") as gate:
        limits = {
            "requests_per_minute": 600,
            "budgets": [{"window": "day", "amount": "5"}, {"window": "5h", "amount": "1"}],
        }
        made = await gate.key("laptop", limits=limits)
        await gate.key('<img src=x onerror="document.title=1">notebook')
        await asked(gate, made, 3)
        await gate.do("POST", "/upstreams", {"name": "far", "base_url": url, "api_key": UPSTREAM_KEY})
        await gate.do("POST", "/prices", {"model": "gpt-6.1-sol", "input": "2", "output": "12"})
        yield gate, made


async def test_a_key_is_created_shown_once_limited_replaced_and_revoked(
    browser: Browser, tmp_path: Path
) -> None:
    async with gateway(tmp_path) as gate, owner(browser, gate, "keys") as at:
        await at.has("No key fits the filters.")
        await at.press("Create a key")
        box = at.page.get_by_role("dialog")
        await expect(box.get_by_label("Name")).to_be_focused()
        await box.get_by_label("Name").fill("my laptop")
        await box.locator("summary").click()
        await box.get_by_label("Requests a minute").fill("30")
        await box.get_by_label("Budget: a day").fill("2.50")
        await box.get_by_label("From where").fill("nowhere")
        await at.press("Create", within="dialog")
        # What the daemon does not like is said at its field.
        await expect(box.locator(".wrong:visible")).to_contain_text("'nowhere' is no address")
        await expect(box.get_by_label("From where")).to_be_focused()
        await box.get_by_label("From where").fill("127.0.0.0/8")
        await at.press("Create", within="dialog")
        shown = at.page.get_by_role("dialog", name="The key my laptop")
        secret = (await shown.locator("pre").inner_text()).strip()
        assert re.fullmatch(r"sk-[0-9A-Za-z]{49}", secret)
        await at.page.keyboard.press("Escape")
        await expect(at.page.get_by_role("button", name="Create a key")).to_be_focused()
        row = at.page.locator(".listing tbody tr")
        await expect(row).to_contain_text(["30 requests/min"])
        # The browser gives back the focus a moment before the page hears that the dialog is closed.
        await expect(at.page.locator("dialog")).to_have_count(0)
        assert secret not in await at.page.content()
        assert (await gate.stand.ask("hi", headers={"Authorization": f"Bearer {secret}"})).status == 200
        # Limits are changed and the rest stays.
        await at.press("Edit")
        await expect(box.get_by_label("Requests a minute")).to_have_value("30")
        await box.get_by_label("Requests a minute").fill("")
        await at.press("Save", within="dialog")
        await expect(row).not_to_contain_text("requests/min")
        await expect(row).to_contain_text("$2.50 a day")
        # A new text, and the old one ends.
        await at.press("Rotate")
        await at.press("Rotate", within="dialog")
        fresh = (await shown.locator("pre").inner_text()).strip()
        assert fresh != secret
        await at.page.keyboard.press("Escape")
        assert (await gate.stand.ask("hi", headers={"Authorization": f"Bearer {secret}"})).status == 401
        # No is no.
        await at.press("Revoke")
        await expect(at.page.get_by_role("dialog").get_by_role("button", name="Cancel")).to_be_focused()
        await at.page.keyboard.press("Escape")
        await expect(row).to_have_count(1)
        await at.press("Revoke")
        await at.press("Revoke", within="dialog")
        await at.has("my laptop is revoked", ".toasts")
        await expect(row).to_have_count(0)
        assert (await gate.stand.ask("hi", headers={"Authorization": f"Bearer {fresh}"})).status == 401
        await at.page.locator("select[name=key-status]").select_option("revoked")
        await expect(row).to_have_count(1)
        assert "status=revoked" in at.page.url
        assert [one for one in at.complaints if "400" not in one] == []


async def test_a_balance_is_credited_and_corrected_with_a_reason(browser: Browser, tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate, owner(browser, gate, "users") as at:
        await at.press("Create a user")
        box = at.page.get_by_role("dialog")
        await box.get_by_label("Name").fill("Ana Lima")
        await expect(box.get_by_label("Pays from a balance")).to_be_checked()
        await at.press("Create", within="dialog")
        row = at.page.locator(".listing tbody tr", has_text="Ana Lima")
        await row.get_by_role("button", name="Credit").click()
        await box.get_by_label("Amount").fill("12.5")
        await box.get_by_label("Reason").fill("for November")
        await at.press("Credit", within="dialog")
        await at.has("Ana Lima has $12.50 now", ".toasts")
        await expect(row).to_contain_text("$12.50")
        await row.get_by_role("link", name="Ana Lima").click()
        await expect(at.page.locator("h1", has_text="Ana Lima")).to_be_visible()
        await at.press("Adjust")
        await box.get_by_label("Amount").fill("-20")
        await box.get_by_label("Reason").fill("a mistake")
        await at.press("Adjust", within="dialog")
        await expect(box.locator(".wrong:visible")).to_contain_text("only 12.50 dollars can be taken")
        await box.get_by_label("Amount").fill("-2.25")
        await at.press("Adjust", within="dialog")
        entries = at.page.locator(".listing tbody tr")
        await expect(entries).to_have_count(2)
        await expect(entries.first).to_contain_text("-$2.25")
        await expect(entries.first).to_contain_text("a mistake")
        await at.press("Edit")
        await box.locator("summary").click()
        await box.get_by_label("Budget: a month").fill("40")
        await at.press("Save", within="dialog")
        await expect(at.page.locator("section", has_text="Budgets")).to_contain_text("$0.00 of $40.00")
        await at.press("Suspend")
        await at.press("Suspend", within="dialog")
        await at.has("suspended")
        await at.press("Activate")
        await expect(at.page.get_by_role("button", name="Suspend")).to_be_visible()
        kinds = [one["kind"] for one in (await gate.do("GET", "/entries"))["entries"]]
        assert kinds == ["adjust", "credit"]


async def test_usage_adds_up_and_comes_as_a_table(browser: Browser, busy: tuple[Gateway, Any]) -> None:
    gate, _ = busy
    total = (await gate.do("GET", "/usage/sums"))["total"]
    async with owner(browser, gate, "usage") as at:
        await expect(at.tile("Requests")).to_have_text(str(total["turns"]))
        shown = float((await at.tile("Cost").inner_text()).removeprefix("$"))
        assert shown == pytest.approx(float(total["cost"]), rel=0.01)
        await expect(at.page.locator(".chart canvas")).to_have_count(2)
        sums = at.page.locator("section", has_text="Sums").locator("tbody tr")
        await expect(sums).to_have_text([re.compile(r"laptop \(user of laptop\)")])
        await at.press("Model")
        await expect(sums.locator("th")).to_have_text(["gpt-5.5"])
        assert "by=model" in at.page.url
        rows = at.page.locator("section", has_text="Served by").locator(".listing tbody tr")
        await expect(rows).to_have_count(total["turns"])
        async with at.page.expect_download() as downloaded:
            await at.page.get_by_role("link", name="CSV of the requests").click()
        path = await (await downloaded.value).path()
        found = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        assert sum(float(row["cost"]) for row in found) == pytest.approx(float(total["cost"]))
        # A row leads to its request, which has the same cost.
        await rows.first.get_by_role("link").click()
        await at.has("Cost")
        await at.has(f"${found[0]['cost']}")
        assert at.complaints == []


async def test_upstreams_are_checked_and_the_result_is_shown_at_once(
    browser: Browser, tmp_path: Path
) -> None:
    dead = '[{name: dead, base-url: "http://127.0.0.1:9/v1", api-key: sk-x}]'
    async with (
        upstream() as url,
        gateway(tmp_path, upstreams=dead) as gate,
        owner(browser, gate, "upstreams") as at,
    ):
        rows = at.page.locator(".listing tbody tr")
        await expect(rows).to_contain_text(["configuration"])
        await at.press("Add an upstream")
        box = at.page.get_by_role("dialog")
        await box.get_by_label("Name").fill("far")
        await box.get_by_label("Base URL").fill("http://169.254.169.254/v1")
        await box.get_by_label("API key").fill(UPSTREAM_KEY)
        await at.press("Add an upstream", within="dialog")
        await expect(box.locator(".wrong:visible")).to_contain_text("link-local")
        await box.get_by_label("Base URL").fill(f"{url}/v1")
        await box.get_by_label("Models").fill("gpt-5*, mine=far-model")
        await at.press("Add an upstream", within="dialog")
        await expect(rows).to_have_count(2)
        # It is checked at once.
        await at.has("Checked 1/1 upstreams", "section")
        assert UPSTREAM_KEY not in await at.page.content()
        await at.press("Check now")
        await at.has("Checked 2/2 upstreams", "section")
        results = at.page.locator(".results li")
        await expect(results.filter(has_text="far")).to_contain_text("normal")
        await expect(results.filter(has_text="dead")).to_contain_text("abnormal")
        row = rows.filter(has_text="far")
        await expect(row).to_contain_text("mine=far-model")
        await row.get_by_role("button", name="Edit").click()
        await expect(box.get_by_label("API key")).to_have_value("")
        await box.get_by_label("Priority").fill("4")
        await at.press("Save", within="dialog")
        await expect(row).to_contain_text("priority 4")
        # Its key has stayed.
        assert (await gate.do("POST", "/upstreams/far/check"))["state"] == "normal"
        await row.get_by_role("button", name="Remove").click()
        await at.press("Remove", within="dialog")
        await expect(rows).to_have_count(1)


async def test_prices_are_set_ended_and_history_is_priced_again_after_a_look(
    browser: Browser, tmp_path: Path
) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key()
        await asked(gate, made)
        async with owner(browser, gate, "prices") as at:
            await at.page.get_by_placeholder("Find a model").fill("gpt-5.5")
            row = at.page.locator(".listing tbody tr").filter(
                has=at.page.locator("strong:text-is('gpt-5.5')")
            )
            await expect(row).to_contain_text("built in")
            await row.get_by_role("button", name="Set").click()
            box = at.page.get_by_role("dialog")
            await box.get_by_label("Input", exact=True).first.fill("100")
            await box.get_by_label("Counts from").fill("2020-01-01T00:00")
            await at.press("Save", within="dialog")
            await expect(at.page.locator("section", has_text="Own prices")).to_contain_text("$100.00")
            await at.press("Price history anew")
            await box.get_by_label("Reason").fill("it was wrong")
            await at.press("See what would change", within="dialog")
            await expect(at.page.get_by_role("dialog")).to_contain_text("1 request would cost")
            before = (await gate.usage(1))[0]["cost"]
            await at.press("Price them anew", within="dialog")
            await at.has("1 request is priced anew", ".toasts")
            assert (await gate.usage(1))[0]["cost"] != before
            await at.page.get_by_role("button", name="End").click()
            await at.press("End", within="dialog")
            await expect(at.page.locator("section", has_text="Own prices")).to_contain_text("ended")
            assert await gate.do("POST", "/ledger/check") == {"ok": True, "problems": []}
            assert at.complaints == []


async def test_audit_tells_what_changed(browser: Browser, busy: tuple[Gateway, Any]) -> None:
    gate, made = busy
    await gate.do("PATCH", f"/keys/{made['key']['id']}", {"name": "laptop of Ana"})
    async with owner(browser, gate, "audit") as at:
        row = at.page.locator(".listing tbody tr").first
        await expect(row).to_contain_text("key.update")
        await expect(row.locator("del")).to_have_text("laptop")
        await expect(row).to_contain_text("laptop of Ana")
    await gate.do("PATCH", f"/keys/{made['key']['id']}", {"name": "laptop"})


async def test_the_holder_of_a_key_sees_its_own_until_the_key_ends(browser: Browser, tmp_path: Path) -> None:
    async with gateway(tmp_path) as gate:
        made = await gate.key("editor", limits={"budgets": [{"window": "month", "amount": "9"}]})
        await asked(gate, made, 2)
        async with visitor(browser, gate, made["secret"]) as at:
            await expect(at.page.locator("h1", has_text="editor")).to_be_visible()
            await expect(at.page.locator("nav a")).to_have_text(["My usage", "Connect"])
            await expect(at.tile("Requests")).to_have_text("2")
            await expect(at.page.locator("section", has_text="Budgets")).to_contain_text("of $9.00")
            # The owner's screens are none.
            await at.page.goto(f"{gate.stand.url}/ui#/gateway/keys")
            await expect(at.page.locator("h1", has_text="editor")).to_be_visible()
            await at.page.get_by_role("link", name="Connect").click()
            await at.has("ANTHROPIC_BASE_URL")
            assert at.complaints == []
            assert not [
                one
                for one in at.requests
                if "/ui/api/" in one and "/own" not in one and "/session" not in one
            ]
            await gate.do("POST", f"/keys/{made['key']['id']}/revoke")
            await at.has("Your session has ended.", ".trouble")
            await expect(at.page.locator("nav")).to_have_count(0)


async def test_without_a_ledger_the_places_say_what_to_set(browser: Browser, tmp_path: Path) -> None:
    async with gateway(tmp_path, "off") as gate, owner(browser, gate, "") as at:
        await at.has("There are none: the accounts serve all.")
        await expect(at.page.get_by_role("button", name="Add an upstream")).to_be_disabled()
        for place in ("keys", "users", "usage", "prices", "audit"):
            await at.open(f"gateway/{place}")
            await at.has("ledger: personal")
        assert at.complaints == []


@pytest.mark.parametrize(
    ("theme", "size", "lang"),
    [("light", DESK, "en-GB"), ("dark", PHONE, "zh-CN")],
    ids=["light", "dark-phone"],
)
async def test_nothing_shuts_anybody_out(
    browser: Browser, axe: str, busy: tuple[Gateway, Any], theme: str, size: dict[str, int], lang: str
) -> None:
    gate, made = busy
    look = (
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map("
        "v => `${v.impact} ${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ')}`))"
    )

    async def check(at: Tab, place: str) -> None:
        assert await at.too_wide() == [], place
        if lang == "zh-CN":
            for text in await at.page.evaluate(OWN_TEXTS):
                assert re.search(r"[\u3400-\u9fff]", text) or _SAME.match(text), f"{place}: {text!r}"
        await at.page.evaluate(f"() => {{ {axe}\n; }}")
        assert await at.page.evaluate(look) == [], place

    async with owner(browser, gate, "keys", theme=theme, size=size, lang=lang) as at:
        for place in (*PLACES, f"users/{made['key']['user_id']}"):
            await at.open(f"gateway/{place}")
            await at.page.locator("main .listing tbody tr").first.wait_for()
            await check(at, place)
        await at.open("gateway/keys")
        await at.page.locator("main .head button").click()
        await at.page.locator("dialog summary").click()
        await check(at, "a new key")
        await at.page.keyboard.press("Escape")
        await at.open("gateway/upstreams")
        await at.page.locator("main .head .primary").click()
        await check(at, "a new upstream")
        assert at.complaints == []
    async with visitor(browser, gate, made["secret"], theme=theme, size=size, lang=lang) as at:
        for place in ("own", "connect"):
            await at.open(place)
            await at.page.locator("main :is(.tile, .snippet)").first.wait_for()
            await check(at, place)
        assert at.complaints == []


async def test_with_several_users_whose_key_it_is_has_to_be_said(browser: Browser, tmp_path: Path) -> None:
    """The owner is never billed: a key of theirs would be one for nothing."""
    async with gateway(tmp_path) as gate:
        made = await gate.key("laptop")
        await asked(gate, made)
        async with owner(browser, gate, "keys") as at:
            await at.press("Create a key")
            box = at.page.get_by_role("dialog")
            await box.get_by_label("Name").fill("phone")
            await at.press("Create", within="dialog")
            await expect(box.get_by_label("User")).to_be_focused()
            await box.get_by_label("User").select_option(label="user of laptop")
            await at.press("Create", within="dialog")
            await expect(at.page.get_by_role("dialog", name="The key phone")).to_be_visible()
            await at.page.keyboard.press("Escape")
            # From a key to what it has used, and from a user to a balance in which one request is seen.
            await at.page.get_by_role("link", name="laptop", exact=True).click()
            await expect(at.page.locator("select[name=usage-key]")).to_have_value(made["key"]["id"])
            await at.open("gateway/users")
            row = at.page.locator(".listing tbody tr", has_text="user of laptop")
            await expect(row).to_contain_text("$4.999")
            assert at.complaints == []


async def test_a_list_that_could_not_be_read_is_asked_for_again(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(tmp_path) as gate:
        await gate.key("laptop")
        assert gate.stand.daemon.books is not None
        ledger = gate.stand.daemon.books.ledger

        async def read(question: Any) -> Any:
            raise LedgerAway("the database is away")

        with monkeypatch.context() as away:
            away.setattr(ledger, "read", read)
            async with owner(browser, gate, "audit", lang="zh-CN") as at:
                await at.has("账本数据库暂时不可用")
                away.undo()
                await at.press("立即重试")
                await at.has("key.create")
                await expect(at.page.get_by_role("alert").filter(visible=True)).to_have_count(0)
