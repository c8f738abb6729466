"""Languages, themes, and the page without a mouse."""

import re
from pathlib import Path

import pytest
from playwright.async_api import Browser, expect

from tests.browser.desk import DESK, PHONE, named_files, tab, visit_all
from tests.harness import Stand, standing

pytestmark = [pytest.mark.browser, pytest.mark.asyncio(loop_scope="session")]

# Visible texts of the page's own: not those that are marked as somebody's words, nor fields and code.
OWN_TEXTS = """() => {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        if (parent.closest("[translate=no], script, style, noscript, .plot")) continue;
        if (!parent.checkVisibility()) continue;
        found.push(walker.currentNode.nodeValue.trim());
    }
    for (const one of document.querySelectorAll("[aria-label], [placeholder], [title]")) {
        if (one.closest("[translate=no]")) continue;
        for (const name of ["aria-label", "placeholder"]) if (one.hasAttribute(name)) found.push(one.getAttribute(name));
    }
    return found;
}"""

# Names, units and words that Chinese pages write the same way.
SAME = re.compile(
    r"^([\d.,:%+\-\u2013·/ ]|ms|kB|B|s|p95|h|d|K|M|API|Token|YOUR_KEY|codex(_\w+)?|GPT-[\w.-]+|5h|week|claude|pong|English)*$"
)


async def test_every_text_follows_the_language_and_fits_a_phone(browser: Browser, world: Stand) -> None:
    async with tab(browser, world.url, lang="zh-CN") as at:
        async for place in visit_all(at, world):
            assert await at.page.locator("html").get_attribute("lang") == "zh-CN"
            for text in await at.page.evaluate(OWN_TEXTS):
                assert re.search(r"[\u3400-\u9fff]", text) or SAME.match(text), f"{place}: {text!r}"
            await at.page.set_viewport_size({"width": PHONE["width"], "height": PHONE["height"]})
            assert await at.too_wide() == [], place
            await at.page.set_viewport_size({"width": DESK["width"], "height": DESK["height"]})
        assert at.complaints == []


async def test_the_language_is_chosen_and_remembered(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("accounts")
        await at.page.locator("#language").select_option("zh-CN")
        await expect(at.page.locator("h1")).to_have_text("账户")
        await expect(at.page.locator("#language")).to_be_focused()
        await at.page.reload()
        await expect(at.page.locator("h1")).to_have_text("账户")
        assert await at.page.title() == "账户 · codex-proxy"
        await at.page.locator("#language").select_option("en")
        await expect(at.page.locator("h1")).to_have_text("Accounts")


async def test_the_theme_follows_the_system_until_it_is_chosen(browser: Browser, tmp_path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    async with standing(tmp_path) as stand, tab(browser, stand.url) as at:
        await at.open("now")
        light = await at.page.evaluate(ground)
        await at.page.emulate_media(color_scheme="dark")
        dark = await at.page.evaluate(ground)
        assert light != dark
        await at.page.locator("#theme").click()
        await expect(at.page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
        assert await at.page.evaluate(ground) == light
        await at.page.locator("#theme").click()
        await at.page.emulate_media(color_scheme="light")
        await at.page.reload()
        await at.page.locator("main h1").wait_for()
        assert await at.page.evaluate(ground) == dark
        await at.page.locator("#theme").click()
        await expect(at.page.locator("#theme")).to_have_attribute("aria-label", "Theme: as the system")
        assert at.complaints == []


async def test_all_is_reached_without_a_mouse(browser: Browser, tmp_path: Path) -> None:
    async with standing(tmp_path, auths=named_files) as stand, tab(browser, stand.url) as at:
        await at.open("now")
        keys = at.page.keyboard
        focused = at.page.locator(":focus")
        await keys.press("Tab")
        await expect(focused).to_have_text("Skip to the content")
        await keys.press("Enter")
        await expect(focused).to_have_attribute("id", "main")
        # Along the menu to the accounts: the heading is what is read out there.
        await at.page.locator(".brand").focus()
        await keys.press("Tab")
        await keys.press("Tab")
        await expect(focused).to_have_text("Accounts")
        outline = await focused.evaluate("e => getComputedStyle(e).outlineStyle")
        assert outline == "solid"
        await keys.press("Enter")
        await expect(focused).to_have_text("Accounts")
        assert await focused.evaluate("e => e.tagName") == "H1"
        await at.page.locator("tr.account").first.wait_for()
        for _ in range(40):
            await keys.press("Tab")
            if await focused.evaluate("e => e.classList.contains('expand')"):
                break
        await keys.press("Enter")
        await expect(focused).to_have_attribute("aria-expanded", "true")
        for _ in range(12):
            await keys.press("Tab")
            if await focused.get_attribute("data-action") == "disable":
                break
        await keys.press("Enter")
        box = at.page.get_by_role("dialog")
        await expect(box).to_be_visible()
        # The focus stays in the dialog.
        for _ in range(6):
            await keys.press("Tab")
            inside = "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
            assert await at.page.evaluate(inside)
        await box.get_by_role("button", name="Disable").focus()
        await keys.press("Enter")
        await at.has("it takes no new requests", ".toasts")
        assert at.complaints == []
