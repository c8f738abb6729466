"""The list of requests and the story of one, with a daemon that really served them."""

import itertools
import json
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from codex_proxy.simulator import Simulator
from tests.browser.desk import moved, tab
from tests.harness import LITE, STANDARD, standing

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]


async def test_a_new_request_appears_by_itself_and_rows_stay_the_same_nodes(
    browser: Browser, tmp_path: Path
) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        first = await stand.ask("the first")
        await at.open("requests")
        rows = at.page.locator("tr.request")
        await expect(rows).to_have_count(1)
        await rows.first.evaluate("row => { row.dataset.seen = 'yes'; }")
        second = await stand.ask("the second", model=LITE)
        await expect(rows).to_have_count(2)
        await expect(rows.first).to_have_attribute("data-id", second.headers["x-request-id"])
        await expect(rows.first).to_contain_text(LITE)
        await expect(rows.nth(1)).to_have_attribute("data-id", first.headers["x-request-id"])
        # Patched, not drawn anew.
        await expect(rows.nth(1)).to_have_attribute("data-seen", "yes")
        usage = first.events[-1].json["response"]["usage"]
        await expect(rows.nth(1).locator(".c-tokens")).to_contain_text(f"{usage['input_tokens']}")
        await expect(rows.nth(1).locator(".c-tokens")).to_contain_text(f"{usage['output_tokens']} out")
        # Paused, it stays as it is; what came meanwhile is asked for afterwards.
        await at.press("Pause")
        await stand.ask("the third")
        await stand.idle()
        await at.page.wait_for_timeout(800)
        await expect(rows).to_have_count(2)
        await at.press("Go on")
        await expect(rows).to_have_count(3)
        assert at.complaints == []


async def test_filters_live_in_the_address(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        wanted = await stand.ask("one", model=LITE)
        await stand.ask("two", model=STANDARD)
        failed = await stand.ask("three", model="gpt-none")
        assert failed.status == 400
        await stand.idle()
        await at.open("requests")
        rows = at.page.locator("tr.request")
        await expect(rows).to_have_count(3)
        await at.page.locator("select[name=model]").select_option(LITE)
        await expect(rows).to_have_count(1)
        assert f"model={LITE}" in at.page.url
        # The live tail keeps to them.
        await stand.ask("four", model=STANDARD)
        another = await stand.ask("five", model=LITE)
        await expect(rows).to_have_count(2)
        await expect(rows.first).to_have_attribute("data-id", another.headers["x-request-id"])
        # They survive a reload, a look at one request and the way back.
        await at.page.reload()
        await expect(rows).to_have_count(2)
        await rows.nth(1).click()
        await at.has(wanted.headers["x-request-id"])
        await at.page.locator(".back a").click()
        await expect(rows).to_have_count(2)
        await at.press("Clear filters")
        await expect(rows).to_have_count(5)
        assert "?" not in at.page.url
        await at.page.locator("select[name=outcome]").select_option("failed")
        await expect(rows).to_have_count(1)
        await expect(rows.first).to_contain_text("400")
        # The end of an id: its beginning is the time, which the others share.
        await at.page.goto(f"{stand.url}/ui#/requests?q={wanted.headers['x-request-id'][-10:]}")
        await expect(rows).to_have_count(1)
        await at.page.goto(f"{stand.url}/ui#/requests?account=nobody")
        await at.has("No request fits the filters.")
        assert at.complaints == []


async def test_the_story_of_a_request_that_moved(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        request_id = await moved(stand)
        story = (await stand.get(f"/why/{request_id}")).json
        await at.open(f"requests/{request_id}")
        phases = at.page.locator(".waterfall tbody tr")
        await expect(phases.filter(has_text="failed, the next one is chosen")).to_have_count(2)
        await expect(phases.last).to_contain_text("answering")
        # Each bar begins where the one before it ends, the last ends with the rail.
        bars = await at.page.locator(".waterfall .step").evaluate_all(
            "bars => bars.map(bar => [parseFloat(bar.style.left), parseFloat(bar.style.left) + parseFloat(bar.style.width)])"
        )
        for (_, end), (start, _) in itertools.pairwise(bars):
            assert abs(end - start) < 0.01
        assert bars[0][0] == 0
        assert abs(bars[-1][1] - 100) < 1
        steps = at.page.locator(".story > li")
        await expect(steps).to_have_count(3)
        tried = [step["attempts"][0] for step in story["steps"]]
        for place, attempt in enumerate(tried):
            await expect(steps.nth(place)).to_contain_text(attempt["account"])
        assert [attempt["status"] for attempt in tried] == [502, 429, 200]
        await expect(steps.nth(0)).to_contain_text("the backend broke 502")
        await expect(steps.nth(1)).to_contain_text("asked too fast 429")
        # Why the others were not: the rule and its evidence.
        last = steps.nth(2)
        for one in story["steps"][2]["decision"]["excluded"]:
            row = last.locator("tr", has=at.page.locator("th", has_text=one["account"])).last
            await expect(row).to_contain_text(one["evidence"])
        best = story["steps"][0]["decision"]["candidates"][0]
        row = steps.nth(0).locator("tr.chosen")
        await expect(row).to_contain_text(best["account"])
        heads = await steps.nth(0).locator("table").first.locator("thead th").all_inner_texts()
        assert heads[:2] == ["Account", "Score"]
        assert set(best["parts"]) <= set(heads[2:])
        assert at.complaints == []


async def test_a_request_that_is_not_kept_says_so(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("requests/req_nobody")
        await at.has("no turn with the id", ".trouble")


async def test_a_name_is_never_markup(browser: Browser, tmp_path: Path) -> None:
    """An alias is anybody's word who may write the file; it comes out as text wherever it is shown."""
    evil = "<img src=x onerror=document.title=1>"

    def named(sim: Simulator, folder: Path) -> None:
        for path in sim.write_auth_files(folder):
            value = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**value, "alias": evil}), encoding="utf-8")

    async with standing(tmp_path, accounts=1, auths=named) as stand, tab(browser, stand.url) as at:
        await stand.ask("hi")
        await stand.idle()
        for place in ("accounts", "horizon", "requests", "cache"):
            await at.open(place)
            await at.has(evil)
            assert await at.page.locator("main img").count() == 0
        await at.open("requests")
        await at.page.locator("tr.request a").click()
        await at.has(evil, ".facts")
        assert await at.page.title() == "Requests · codex-proxy"
        assert at.complaints == []


async def test_many_requests_are_looked_at_a_page_at_a_time(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        for number in range(130):
            await stand.ask(f"number {number}")
        await stand.idle()
        await at.open("requests")
        rows = at.page.locator("tr.request")
        await expect(rows).to_have_count(100)
        await at.press("Older ones")
        await expect(rows).to_have_count(130)
        ids = await rows.evaluate_all("rows => rows.map(row => row.dataset.id)")
        assert len(set(ids)) == 130
        await at.has("That is all; the oldest that is kept is of")
        # Whoever reads further down is not pushed away.
        await at.page.evaluate("scrollTo(0, 1200)")
        await stand.ask("one more")
        fresh = at.page.locator("button.fresh")
        await expect(fresh).to_have_text("1 new request")
        await expect(rows).to_have_count(130)
        await fresh.click()
        await expect(rows).to_have_count(131)


async def test_a_flood_leaves_no_gap_and_a_short_list(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("requests")
        rows = at.page.locator("tr.request")
        asked = [(await stand.ask(f"number {number}")).headers["x-request-id"] for number in range(260)]
        await stand.idle()
        newest = list(reversed(asked))
        read = "rows => rows.map(row => row.dataset.id)"
        # No more than 50 are told of at a time; the others are asked for when it is calm again.
        await at.page.wait_for_function(
            """newest => {
                const ids = [...document.querySelectorAll("tr.request")].map(row => row.dataset.id);
                return ids.length >= 100 && ids.every((id, place) => id === newest[place]);
            }""",
            arg=newest,
        )
        ids = await rows.evaluate_all(read)
        assert len(ids) <= 200
        for _ in range(2):
            if await at.page.get_by_role("button", name="Older ones").is_visible():
                before = await rows.count()
                await at.press("Older ones")
                await expect(rows).not_to_have_count(before)
        assert await rows.evaluate_all(read) == newest
