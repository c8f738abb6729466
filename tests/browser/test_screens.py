"""Each screen shows what the daemon knows, after real turns through a real browser."""

import re
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from codex_proxy.accounts.outlook import Outlook
from tests.browser.desk import DESK, PHONE, RATE, fill, steady_pace, tab, visit_all
from tests.harness import STANDARD, Stand, standing

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def test_now_shows_figures_and_their_course(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        for number in range(4):
            await stand.ask(f"hello {number} " * 30, prompt_cache_key="one")
        await stand.idle()
        await at.open("now")
        await at.has("All is well: 3 of 3 accounts can serve.")
        await expect(at.tile("In flight")).to_have_text("0")
        await expect(at.tile("Errors")).to_have_text("0%")
        stats = (await stand.stats())["summary"]
        share = stats["total_cache_read_tokens"] / stats["total_input_tokens"]
        await expect(at.tile("Cached")).to_have_text(f"{round(100 * share)}%")
        await expect(at.page.locator(".chart canvas")).to_have_count(4)
        await at.has("version")
        assert at.complaints == []


async def test_now_counts_what_is_under_way(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        for account in stand.accounts:
            account.set("stall", where="middle", after=3, seconds=30)
        await at.open("now")
        async with stand.asking("wait for it") as response:
            await response.content.readany()
            await expect(at.tile("In flight")).to_have_text("1")
            await at.has("1 stream · 0 queued", ".tile")
        await expect(at.tile("In flight")).to_have_text("0")


async def test_horizon_says_when_the_pool_is_dry(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady_pace(monkeypatch)
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await fill(stand)
        await at.open("horizon")
        await at.has("At this pace the pool is dry at", "h1 + .news")
        await at.has("Next reset", "h1 + .news")
        lines = at.page.locator(".timeline .line:not(.axis):not(.pool-line)")
        await expect(lines).to_have_count(3)
        used = {account.primary.view(stand.sim.now())["used_percent"] for account in stand.accounts}
        shown = await at.page.locator(".timeline svg text.lane-text").all_text_contents()
        left = {int(found[1]) for text in shown if (found := re.match(r"5h · (\d+)% left", text))}
        assert {100 - percent for percent in used} == left
        assert await at.page.locator(".timeline").get_attribute("aria-label")
        # The same for whoever cannot see it.
        await at.press("Table")
        await expect(at.page.locator("main tbody tr")).to_have_count(6)
        assert "view=table" in at.page.url
        await at.page.reload()
        first = stand.accounts[0]
        row = at.page.locator("main tbody tr", has_text=stand.known(first).alias).filter(has_text="5h")
        await expect(row).to_contain_text(f"{first.primary.used_percent:.0f}%")
        assert at.complaints == []


async def test_a_pool_that_was_not_watched_for_long_says_so(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Outlook, "rate", RATE)
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("horizon")
        await at.has("How long the pool lasts is not known yet", "h1 + .news")


async def test_cache_adds_up(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        for number in range(3):
            await stand.ask("a long story " * 50 * (number + 1), prompt_cache_key="tale")
        await stand.ask("another")
        await stand.idle()
        await at.open("cache")
        await expect(at.tile("Requests")).to_have_text("4")
        summary = (await stand.stats())["summary"]
        share = summary["total_cache_read_tokens"] / summary["total_input_tokens"]
        shown = await at.text(".tile .value")
        assert abs(float(shown.rstrip("%")) - 100 * share) < 0.06
        row = at.page.locator("section", has_text="By what a conversation").locator("tbody tr")
        await expect(row.filter(has_text="prompt_cache_key").locator("td").first).to_have_text("3")
        await expect(row.filter(has_text="beginning").locator("td").first).to_have_text("1")
        await at.press("7d")
        assert "hours=168" in at.page.url
        assert at.complaints == []


async def test_set_up_has_a_text_for_every_client_and_a_test_that_shows_its_steps(
    browser: Browser, tmp_path: Path
) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("setup")
        await at.has(stand.url)
        tabs = at.page.get_by_role("tab")
        await expect(tabs).to_have_text([
            "Claude Code", "Codex CLI", "OpenAI SDK", "Claude SDK", "opencode", "aider", "Cursor", "curl",
        ])  # fmt: skip
        await expect(at.page.locator("#client-panel")).to_contain_text(f"ANTHROPIC_BASE_URL={stand.url}")
        await tabs.first.focus()
        await at.page.keyboard.press("ArrowRight")
        await expect(at.page.locator("#client-panel")).to_contain_text('wire_api = "responses"')
        assert "client=codex" in at.page.url
        await at.page.locator("select[name=dialect]").select_option("messages")
        await at.press("Send")
        await at.page.locator(".try-end.good").wait_for()
        steps = at.page.locator(".try-steps li")
        await expect(steps.filter(has_text="Account picked")).to_have_count(1)
        await at.page.get_by_role("link", name="Look at the request").click()
        await at.page.locator(".waterfall").wait_for()
        assert at.complaints == []


async def test_a_test_request_that_nobody_can_serve_says_so(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1, max_retry=0) as stand, tab(browser, stand.url) as at:
        await at.open("setup")
        await at.page.locator("select[name=try-model]").select_option(STANDARD)
        stand.accounts[0].set("usage_limit", resets_in=600)
        await at.press("Send")
        await at.has("It does not work.", ".try-end")
        await expect(at.page.locator(".try-steps li.bad").first).to_be_visible()


@pytest.mark.parametrize(("theme", "size"), [("light", DESK), ("dark", PHONE)], ids=["light", "dark-phone"])
async def test_nothing_shuts_anybody_out(
    browser: Browser, axe: str, world: Stand, theme: str, size: dict[str, int]
) -> None:
    """No fault on any screen, no scrolling sideways; nothing in the console, which is where the policy complains."""
    async with tab(browser, world.url, theme=theme, size=size) as at:
        async for place in visit_all(at, world):
            assert await at.too_wide() == [], place
            # Not by a script tag: the policy would refuse it, as it should.
            await at.page.evaluate(f"() => {{ {axe}\n; }}")
            found = await at.page.evaluate(
                "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map("
                "v => `${v.impact} ${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ')}`))"
            )
            assert found == [], place
        assert at.complaints == []
