"""What browser tests share: a real Chromium, a tab that notes every complaint, accounts with invented names."""

import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    Response,
    async_playwright,
)

from codex_proxy.accounts.outlook import Outlook
from codex_proxy.simulator import Script, Simulator
from tests.harness import LITE, STANDARD, Stand

NAMES = (
    "atelier", "backup", "harbour", "lab-1", "lab-2", "night-shift", "orchard", "research", "studio",
)  # fmt: skip
"""What the accounts are called; nobody's."""

SCREENS = ("now", "accounts", "horizon", "requests", "cache", "setup", "start")

PHONE = {"width": 360, "height": 740}
DESK = {"width": 1200, "height": 800}

# A slow machine with other work; nothing here takes that long by itself.
PATIENCE_MS = 10_000


def chromium() -> str | None:
    """Return where a Chromium is."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@contextlib.asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    """Start a browser without a window."""
    program = chromium()
    if program is None:
        pytest.skip("there is no Chromium; `apt-get install chromium` brings one")
    async with async_playwright() as playwright:
        # As root it runs only without its sandbox; it sees nothing but our own page.
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


class Tab:
    """One tab on the page of one daemon, and what it complained of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("response", self._on_response)
        page.on("request", lambda request: self.requests.append(f"{request.method} {request.url}"))

    def _on_console(self, message: ConsoleMessage) -> None:
        # Violations of the policy come here too.
        if message.type in ("error", "warning"):
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status}: {response.url}")

    async def open(self, place: str = "now") -> None:
        """Go to a screen and wait until it is there."""
        await self.page.goto(f"{self.url}/ui#/{place}")
        await self.page.locator("main h1").wait_for()

    async def text(self, selector: str = "main") -> str:
        """Return the visible text of the first match."""
        return await self.page.locator(selector).first.inner_text()

    async def has(self, text: str, selector: str = "main") -> None:
        """Wait until *text* is to be read in *selector*."""
        await self.page.locator(selector).filter(has_text=text).first.wait_for()

    def tile(self, name: str) -> Locator:
        """Return the figure that is called *name*."""
        named = self.page.locator("dt", has_text=re.compile(f"^{re.escape(name)}$"))
        return self.page.locator(".tile", has=named).locator(".value")

    async def press(self, name: str, *, within: str = "body") -> None:
        """Press the button that is called *name*."""
        await self.page.locator(within).get_by_role("button", name=name, exact=True).click()

    async def too_wide(self) -> list[str]:
        """Return what does not fit: the page itself, or something that is always there to be pressed."""
        found: list[str] = await self.page.evaluate(
            """() => [...document.querySelectorAll("html, header button, header select, nav a, main button")]
                .filter(one => one.checkVisibility() && one.closest(".scroll, .snippet") === null)
                .filter(one => one.scrollWidth > innerWidth || one.getBoundingClientRect().right > innerWidth + 0.5)
                .map(one => one.outerHTML.slice(0, 80))"""
        )
        return found


@contextlib.asynccontextmanager
async def tab(
    browser: Browser, url: str, *, lang: str = "en-GB", theme: str = "light", size: dict[str, int] = DESK
) -> AsyncIterator[Tab]:
    """Open a tab of a new visitor."""
    key = (lang, theme, size["width"])
    context = _contexts.setdefault(browser, {}).get(key)
    if context is None:
        context = _contexts[browser][key] = await browser.new_context(
            viewport={"width": size["width"], "height": size["height"]},
            locale=lang,
            color_scheme="dark" if theme == "dark" else "light",
            timezone_id="Europe/Berlin",
            reduced_motion="reduce",
        )
    page = await context.new_page()
    try:
        yield Tab(page, url)
    finally:
        await page.close()
        # Each daemon has a port, and storage, of its own; cookies know no ports.
        await context.clear_cookies()


_contexts: WeakKeyDictionary[Browser, dict[tuple[str, str, int], BrowserContext]] = WeakKeyDictionary()
"""Kept: to make one takes longer than many a test."""


def named_files(sim: Simulator, folder: Path) -> None:
    """Write the accounts' files, with the invented names as aliases; one is switched off."""
    for path, name in zip(sim.write_auth_files(folder), NAMES, strict=False):
        value = json.loads(path.read_text(encoding="utf-8"))
        off = {"disabled": True} if name == "backup" else {}
        path.write_text(json.dumps({**value, **off, "alias": name}), encoding="utf-8")


RATE = Outlook.rate
"""As it really is; the pool that all share has another."""


def steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the forecast know at once how fast the pool spends; it watches for ten minutes otherwise."""
    monkeypatch.setattr(Outlook, "rate", lambda self, now: (0.02, 0.0016))


async def fill(stand: Stand) -> None:
    """Fill the windows, as after some days of work; each resets at another time."""
    now, hour = stand.sim.now(), 3_600.0
    for place, account in enumerate(stand.accounts):
        account.use(primary=(7 + 19 * place) % 96, secondary=(12 + 31 * place) % 88)
        account.primary.reset_at = now + hour * (0.7 + (place * 1.3) % 4.2)
        account.secondary.reset_at = now + hour * (9 + (place * 41) % 150)
    await stand.post("/check-quota")


async def settle(stand: Stand) -> None:
    """Let one account reach its limit, one lose its plan and one its login."""
    limited, unpaid, lost = (stand.accounts[place] for place in (3, 5, 7))
    limited.set("usage_limit", resets_in=2_700)
    unpaid.set("payment")
    lost.set("revoked")
    stand.in_order_of(limited, unpaid, lost)
    await stand.ask("who is there?", prompt_cache_key="settling")
    await stand.post("/refresh")
    stand.daemon.pool.apply_settings(stand.daemon.live.current)


async def work(stand: Stand, rounds: int = 4) -> None:
    """Ask this and that, in every dialect and with every end there is."""
    tasks = ("write the tests", "name this thing", "why is it slow", "tidy the imports", "explain the error")
    for number in range(rounds):
        for place, text in enumerate(tasks):
            await stand.ask(
                " ".join([text] * (30 * (number + 1))),
                prompt_cache_key=f"conversation-{place}",
                model=STANDARD if place % 2 else LITE,
            )
    for text in ("read the file", "and the next one"):
        said = [{"role": "user", "content": text * 40}]
        await stand.post("/v1/messages", {"model": "claude-sonnet-4-5", "max_tokens": 400, "messages": said})
        await stand.post("/v1/chat/completions", {"model": STANDARD, "messages": said})
    await stand.ask("nobody has this", model="gpt-none")
    async with stand.asking("sim:long 400") as response:
        await response.content.readany()
    await stand.idle()
    await moved(stand)


async def moved(stand: Stand) -> str:
    """Ask what two accounts could not answer before a third did, thinking first; return the request's id."""
    stand.sim.script(Script.state("server_error", status=502), Script.state("rate_limit"))
    stand.sim.script(Script.reasoning("**Looking**", "Here it is, word by word.", delay=0.02))
    answer = await stand.ask("what moved?", prompt_cache_key="moving")
    await stand.idle()
    return answer.headers["x-request-id"]


async def visit_all(at: Tab, stand: Stand) -> AsyncIterator[str]:
    """Go to every screen, wait until there is something on it, and yield its place."""
    for place in (*SCREENS, f"requests/{await moved(stand)}"):
        await at.open(place)
        content = ".tile, .account, .request, .timeline .line, .waterfall, .snippet, .wizard"
        await at.page.locator(f"main :is({content})").first.wait_for()
        if place == "accounts":
            await at.page.locator("button.expand").nth(3).click()
        yield place
