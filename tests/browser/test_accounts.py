"""What an owner sees of accounts on the page, and does to them."""

import json
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from codex_proxy.simulator import Simulator
from tests.browser.desk import NAMES, fill, named_files, settle, tab
from tests.harness import standing

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def test_every_account_with_its_windows_and_what_holds_it(browser: Browser, tmp_path: Path) -> None:
    async with (
        standing(tmp_path, accounts=len(NAMES), auths=named_files) as stand,
        tab(browser, stand.url) as at,
    ):
        await settle(stand)
        await fill(stand)
        await stand.ask("hello")
        await stand.idle()
        told = {one["alias"]: one for one in (await stand.get("/accounts")).json["accounts"]}
        await at.open("accounts")
        rows = at.page.locator("tr.account")
        await expect(rows).to_have_count(len(NAMES))
        for alias, one in told.items():
            row = at.page.locator("tr.account", has=at.page.locator(f".alias:text-is('{alias}')"))
            state = {"cooldown": "cooling", "needs_login": "needs login"}.get(one["status"], one["status"])
            await expect(row.locator(".c-state")).to_contain_text(state)
            await expect(row.locator(".c-requests")).to_contain_text(str(one["total_requests"]))
            for name, place in (("5h", ".c-short"), ("week", ".c-long")):
                windows = one["quota"]["windows"] if one["quota"] else []
                window = next((w for w in windows if w["limit"] == "codex" and w["window"] == name), None)
                used = None if window is None else window["used_percent"]
                await expect(row.locator(f"{place} .meter-text")).to_have_text(
                    "unknown" if used is None else f"{used:.0f}%"
                )
        # The rule and its evidence.
        await at.page.locator("button.expand", has_text=NAMES[3]).click()
        details = at.page.locator("tr.more:not([hidden])")
        await expect(details).to_contain_text("usage limit")
        await expect(details.locator("dt")).to_contain_text(["Rule", "Evidence", "Until"])
        assert at.complaints == []


async def test_sorting_and_filtering(browser: Browser, tmp_path: Path) -> None:
    async with (
        standing(tmp_path, accounts=len(NAMES), auths=named_files) as stand,
        tab(browser, stand.url) as at,
    ):
        await fill(stand)
        await at.open("accounts")
        aliases = at.page.locator("tr.account .alias")
        await expect(aliases).to_have_text(sorted(NAMES))
        header = at.page.get_by_role("columnheader", name="Hours")
        await header.get_by_role("button").click()
        await expect(header).to_have_attribute("aria-sort", "descending")
        used = await at.page.locator("tr.account .c-short .track").evaluate_all(
            "tracks => tracks.map(track => track.dataset.level === 'unknown' ? -1 : +track.ariaValueNow)"
        )
        assert used == sorted(used, reverse=True)
        assert len(set(used)) > 3
        await header.get_by_role("button").click()
        await expect(header).to_have_attribute("aria-sort", "ascending")
        assert "sort=short" in at.page.url
        await at.page.locator("#account-search").fill("lab")
        await expect(aliases).to_have_count(2)
        assert "q=lab" in at.page.url
        await at.page.reload()
        await expect(aliases).to_have_count(2)
        await at.page.locator("#account-search").fill("")
        await at.page.locator(".segments button", has_text="disabled").click()
        await expect(aliases).to_have_text(["backup"])


async def test_disable_and_enable_ask_first_and_change_the_file(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path, auths=named_files) as stand, tab(browser, stand.url) as at:
        file = stand.auths / "simulated-a1.json"
        await at.open("accounts")
        await at.page.locator("button.expand", has_text="atelier").click()
        details = at.page.locator("tr.more:not([hidden])")
        disable = details.get_by_role("button", name="Disable")
        await disable.click()
        box = at.page.get_by_role("dialog", name="Disable atelier?")
        # No is no, and the focus comes back.
        await at.page.keyboard.press("Escape")
        await expect(box).to_have_count(0)
        await expect(disable).to_be_focused()
        assert "disabled" not in json.loads(file.read_text(encoding="utf-8"))
        await disable.click()
        await box.get_by_role("button", name="Disable").click()
        await at.has("atelier: it takes no new requests", ".toasts")
        row = at.page.locator("tr.account", has_text="atelier")
        await expect(row.locator(".c-state")).to_contain_text("disabled")
        assert json.loads(file.read_text(encoding="utf-8"))["disabled"] is True
        await details.get_by_role("button", name="Enable").click()
        await at.page.get_by_role("dialog").get_by_role("button", name="Enable").click()
        await expect(row.locator(".c-state")).to_contain_text("active")
        assert "disabled" not in json.loads(file.read_text(encoding="utf-8"))
        # What cannot be undone so easily begins with the way out.
        await details.get_by_role("button", name="Remove").click()
        await expect(at.page.get_by_role("dialog").get_by_role("button", name="Cancel")).to_be_focused()
        await at.page.get_by_role("dialog").get_by_role("button", name="Remove").click()
        await expect(row).to_have_count(0)
        assert not file.exists()
        assert at.complaints == []


async def test_what_changes_elsewhere_is_seen_without_drawing_all_anew(
    browser: Browser, tmp_path: Path
) -> None:
    async with standing(tmp_path, auths=named_files) as stand, tab(browser, stand.url) as at:
        await at.open("accounts")
        row = at.page.locator("tr.account", has_text="harbour")
        await row.evaluate("row => { row.dataset.seen = 'yes'; }")
        stand.accounts[0].set("usage_limit", resets_in=600)
        stand.in_order()
        await stand.ask("hi")
        await expect(at.page.locator("tr.account", has_text="atelier").locator(".c-state")).to_contain_text(
            "cooling"
        )
        await expect(row).to_have_attribute("data-seen", "yes")
        await expect(at.page.locator(".pool")).to_contain_text("1")
        # A file that is none is told of.
        (stand.auths / "broken.json").write_text("{", encoding="utf-8")
        await at.has("broken.json", ".problems")


async def test_a_round_over_all_accounts_is_told_as_it_goes(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("accounts")
        await at.press("Check all quotas")
        box = at.page.get_by_role("dialog", name="Check all quotas")
        await expect(box).to_contain_text("Done: 3 succeeded, 0 failed.")
        await at.page.keyboard.press("Escape")
        await at.press("Refresh all tokens")
        await at.page.get_by_role("dialog").get_by_role("button", name="Refresh all tokens").click()
        await at.has("Done: 3 succeeded, 0 failed.", "dialog")
        assert len(stand.sim.exchanges) == 3


async def test_import_by_choosing_dropping_and_pasting(browser: Browser, tmp_path: Path) -> None:
    sim = Simulator(accounts=3)

    def one_only(sim: Simulator, folder: Path) -> None:
        for path in named_paths(sim, folder)[1:]:
            path.rename(tmp_path / path.name)

    def named_paths(sim: Simulator, folder: Path) -> list[Path]:
        named_files(sim, folder)
        return sorted(folder.iterdir())

    async with standing(tmp_path, simulator=sim, auths=one_only) as stand, tab(browser, stand.url) as at:
        await at.open("accounts")
        rows = at.page.locator("tr.account")
        await expect(rows).to_have_count(1)
        await at.press("Import")
        box = at.page.get_by_role("dialog", name="Import")
        await box.locator("input[type=file]").set_input_files(tmp_path / "simulated-a2.json")
        await expect(box.locator(".results li.good")).to_have_count(1)
        await expect(rows).to_have_count(2)
        await box.locator("textarea").fill("this is no account")
        await box.get_by_role("button", name="Import text").click()
        await expect(box.locator(".results li.bad")).to_have_count(1)
        # Dropped, as from a file manager.
        text = (tmp_path / "simulated-a3.json").read_text(encoding="utf-8")
        await box.locator(".drop").evaluate(
            """(zone, text) => {
                const data = new DataTransfer();
                data.items.add(new File([text], "dropped.json", {type: "application/json"}));
                zone.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
            }""",
            text,
        )
        await expect(box.locator(".results li.good")).to_contain_text("harbour")
        await expect(rows).to_have_count(3)
        # A secret is not left on the page.
        assert json.loads(text)["refresh_token"] not in await at.page.content()
        assert at.complaints == []


async def test_two_hundred_accounts_come_and_sort_quickly(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=200) as stand, tab(browser, stand.url) as at:
        await at.open("accounts")
        await expect(at.page.locator("tr.account")).to_have_count(200)
        took = await at.page.evaluate(
            """() => {
                const button = document.querySelector("th.c-long button");
                const start = performance.now();
                button.click();
                document.body.getBoundingClientRect();
                return performance.now() - start;
            }"""
        )
        assert took < 1_000
        assert at.complaints == []
