"""Who may see the page, from where to where it leads, and what it says when the daemon is gone."""

import asyncio
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from codex_proxy.alerts import episodes
from codex_proxy.server.dashboard.sessions import COOKIE
from tests.browser.desk import DESK, named_files, tab
from tests.harness import standing

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

KEY = "an-invented-key-of-nobody"


async def test_a_key_opens_the_page_and_the_end_of_the_session_closes_it(
    browser: Browser, tmp_path: Path
) -> None:
    async with standing(tmp_path, admin_key=KEY) as stand, tab(browser, stand.url) as at:
        await at.page.goto(f"{stand.url}/ui#/accounts")
        field = at.page.get_by_label("Key or set-up token")
        await expect(field).to_be_focused()
        await at.has("It stands in the file setup-token in the data folder")
        # Nothing is told before.
        await expect(at.page.locator("nav")).to_have_count(0)
        await field.fill("not-the-key")
        await at.page.keyboard.press("Enter")
        await at.has("This key does not open the page.", ".trouble")
        await field.fill(KEY)
        await at.page.keyboard.press("Enter")
        await expect(at.page.locator("tr.account")).to_have_count(3)
        (cookie,) = await at.page.context.cookies()
        assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == (COOKIE, True, "Strict")
        assert KEY not in await at.page.content()
        # The session ends elsewhere: the page notices by itself.
        await at.page.evaluate(
            """fetch("/ui/api/session").then(r => r.json()).then(s => fetch("/ui/api/session",
                {method: "DELETE", headers: {"x-csrf-token": s.csrf}}))"""
        )
        await at.has("Your session has ended.", ".trouble")
        await expect(at.page.locator("tr.account")).to_have_count(0)
        await at.page.get_by_label("Key or set-up token").fill(KEY)
        await at.page.keyboard.press("Enter")
        await expect(at.page.locator("tr.account")).to_have_count(3)
        await at.press("Sign out")
        await expect(at.page.get_by_label("Key or set-up token")).to_be_visible()
        assert {one for one in at.complaints if not one.startswith(("401", "error: Failed to load"))} == set()


async def test_guessing_is_slowed_and_the_page_says_for_how_long(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path, admin_key=KEY) as stand, tab(browser, stand.url) as at:
        await at.page.goto(f"{stand.url}/ui")
        field = at.page.get_by_label("Key or set-up token")
        enter = at.page.locator("form button")
        statuses: list[int] = []
        for number in range(6):
            await field.fill(f"guess-{number}")
            async with at.page.expect_response("**/ui/api/session") as asked:
                await enter.click()
            statuses.append((await asked.value).status)
        assert statuses == [401] * 5 + [429]
        await expect(enter).to_contain_text("Wait")
        await at.has("Too many tries.", ".trouble")
        await expect(enter).to_be_enabled(timeout=15_000)


async def test_a_first_run_leads_from_nothing_to_an_answer(browser: Browser, tmp_path: Path) -> None:
    put_aside = tmp_path / "aside"
    put_aside.mkdir()
    async with (
        standing(tmp_path, accounts=1, auths=lambda sim, _: named_files(sim, put_aside)) as stand,
        tab(browser, stand.url) as at,
    ):
        await at.page.goto(f"{stand.url}/ui")
        steps = at.page.locator(".wizard > li")
        await expect(steps).to_have_count(3)
        assert "#/start" in at.page.url
        await expect(steps.nth(0)).to_have_attribute("aria-current", "step")
        # A login by code, as a person does it elsewhere.
        await at.press("Get a code")
        # It is empty until the issuer has given one.
        await expect(at.page.locator(".code")).not_to_be_empty()
        code = await at.page.locator(".code").inner_text()
        await expect(at.page.get_by_role("link", name="Open the page")).to_have_attribute(
            "href", f"{stand.sim.url}/codex/device"
        )
        stand.sim.approve_device(code)
        await expect(steps.nth(1)).to_have_attribute("aria-current", "step", timeout=15_000)
        await at.has("1 account is here.")
        assert len(list(stand.auths.glob("*.json"))) == 1
        await at.page.locator("select[name=try-model] option").first.wait_for(
            state="attached", timeout=15_000
        )
        await at.press("Send")
        await at.has("It works.", ".try-end")
        await expect(steps.nth(2)).to_have_attribute("aria-current", "step")
        await at.has("ANTHROPIC_BASE_URL")
        assert at.complaints == []


async def test_a_lost_daemon_is_noticed_and_found_again(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand:
        port = stand.daemon.port
        async with tab(browser, stand.url) as at:
            await at.open("now")
            await at.has("All is well")
            await stand.daemon.stop()
            await at.has("The connection to the proxy is lost. What you see may be old.", ".banner-lost")
            await at.has("Last heard at", ".banner-lost")
            # What was known is still there to be read.
            await at.has("All is well")
            again = tmp_path / "again"
            await asyncio.to_thread(again.mkdir)
            async with standing(again, listen=f"127.0.0.1:{port}"):
                await at.press("Try now")
                await expect(at.page.locator(".banner-lost")).to_be_hidden()
                await expect(at.page.locator("body")).not_to_have_class("is-stale")


async def test_an_alert_stands_above_every_screen_and_is_listed_when_it_is_over(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episodes, "CALM_SECONDS", 0.0)
    async with (
        standing(
            tmp_path, auths=named_files, admin_key=KEY, alerts="{account-needs-login: {for: 0s}}"
        ) as stand,
        tab(browser, stand.url) as at,
    ):
        await at.page.goto(f"{stand.url}/ui")
        await at.page.get_by_label("Key or set-up token").fill(KEY)
        await at.page.keyboard.press("Enter")
        await at.has("All is well")
        lost = stand.accounts[0]
        lost.set("revoked")
        await stand.post("/refresh", headers={"Authorization": f"Bearer {KEY}"})
        await stand.daemon.alerts.look()
        banner = at.page.locator(".banner-alert")
        await expect(banner).to_contain_text("atelier")
        await at.has("1 alert; ", ".verdict")
        # Now everything is there that can be at the top of the page: it fits whatever the width.
        for width in range(320, 1400, 60):
            await at.page.set_viewport_size({"width": width, "height": 700})
            assert await at.too_wide() == [], width
        await at.page.set_viewport_size({"width": DESK["width"], "height": DESK["height"]})
        await at.open("cache")
        await expect(banner).to_contain_text("atelier")
        await at.open("now")
        lost.set("ok")
        lost.issue()
        named_files(stand.sim, stand.auths)
        await stand.until(lambda: stand.known(lost).login.value == "ok")
        await stand.daemon.alerts.look()
        await expect(banner).to_have_count(0)
        await at.has("Account needs a login", ".events")
        assert at.complaints == []


async def test_a_hidden_tab_asks_nothing(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("requests")
        await at.has("Nothing was asked yet.")
        await at.page.evaluate(
            """Object.defineProperty(document, "hidden", {value: true, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"))"""
        )
        before = len(at.requests)
        await stand.ask("hi")
        await at.page.wait_for_timeout(1_500)
        assert at.requests[before:] == []
        await expect(at.page.locator("tr.request")).to_have_count(0)
        await at.page.evaluate(
            """Object.defineProperty(document, "hidden", {value: false, configurable: true});
            document.dispatchEvent(new Event("visibilitychange"))"""
        )
        await expect(at.page.locator("tr.request")).to_have_count(1)


async def test_only_the_visible_screen_is_heard(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        for place in ("now", "accounts", "requests"):
            await at.open(place)
        asked = [one for one in at.requests if "/ui/api/live" in one]
        assert [one.rpartition("=")[2] for one in asked] == ["now", "accounts", "requests"]
