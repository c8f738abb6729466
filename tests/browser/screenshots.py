"""Take the pictures of docs/dashboard.md: `python -m tests.browser.screenshots [FOLDER]`.

A daemon and a simulated backend are started for it; all names in the pictures are invented.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.browser.desk import (
    DESK,
    NAMES,
    PHONE,
    Tab,
    browsing,
    fill,
    moved,
    named_files,
    settle,
    steady_pace,
    tab,
    work,
)
from tests.daemon.test_admin_api import ADMIN, UPSTREAM_KEY, Gateway, gateway, upstream
from tests.harness import Stand, standing
from tests.server.desks import settlement

FOLDER = Path(__file__).parent.parent.parent / "docs" / "images"

KEY = "an-invented-key-of-nobody"


async def take(folder: Path) -> None:
    """Take them all."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
        steady_pace(patch)
        async with browsing() as browser:
            async with standing(Path(scratch), accounts=len(NAMES), auths=named_files) as stand:
                await settle(stand)
                await fill(stand)
                await work(stand)
                request_id = await moved(stand)
                for theme, kind, size in (
                    ("light", "", DESK),
                    ("dark", "", DESK),
                    ("light", "-phone", PHONE),
                ):
                    async with tab(browser, stand.url, theme=theme, size=size) as at:
                        await _screens(stand, at, request_id, folder, f"{theme}{kind}")
            empty = Path(scratch, "empty")
            await asyncio.to_thread(empty.mkdir)
            async with (
                standing(empty, accounts=0, api_keys=f"[{KEY}]") as stand,
                tab(browser, stand.url) as at,
            ):
                await at.page.goto(f"{stand.url}/ui")
                await at.page.locator("#key").wait_for()
                await at.page.screenshot(path=folder / "login-light.png")
                await at.page.locator("#key").fill(KEY)
                await at.page.keyboard.press("Enter")
                await at.page.locator(".wizard").wait_for()
                await at.page.screenshot(path=folder / "start-light.png")


async def gateway_pictures(folder: Path) -> None:
    """Take those of the gateway, with people who are not there."""
    with tempfile.TemporaryDirectory() as scratch:
        async with browsing() as browser, upstream() as url, gateway(Path(scratch)) as gate:
            editor = await _people(gate, url)
            async with tab(browser, gate.stand.url) as at:
                await _enter(gate, at, ADMIN)
                for name in ("keys", "users", "usage", "upstreams"):
                    await at.open(f"gateway/{name}")
                    await at.page.locator("main .listing tbody tr").first.wait_for()
                    if name == "upstreams":
                        await at.press("Check now")
                        await at.page.locator(".results li").first.wait_for()
                    await asyncio.sleep(0.8)
                    await at.page.mouse.move(0, 0)
                    await at.page.screenshot(path=folder / f"gateway-{name}-light.png")
            async with tab(browser, gate.stand.url) as at:
                await _enter(gate, at, editor["secret"])
                await at.page.locator(".chart canvas").first.wait_for()
                await asyncio.sleep(0.8)
                await at.page.screenshot(path=folder / "own-light.png")


async def _enter(gate: Gateway, at: Tab, key: str) -> None:
    await at.page.goto(f"{gate.stand.url}/ui")
    await at.page.locator("#key").fill(key)
    await at.page.keyboard.press("Enter")
    await at.page.locator("nav").first.wait_for()


async def _people(gate: Gateway, url: str) -> Any:
    """Make users, keys and a month of usage; return one of the keys."""
    day = {"window": "day", "amount": "8"}
    limits: dict[str, Any] = {
        "requests_per_minute": 120,
        "budgets": [day, {"window": "month", "amount": "90"}],
    }
    editor = await gate.key("editor", "60", limits=limits)
    made = [
        editor,
        await gate.key("night build", "25", limits={"concurrency": 4, "networks": ["10.0.0.0/8"]}),
        await gate.key("notebook", "40", limits={"models": ["gpt-5*"], "endpoints": ["responses", "chat"]}),
    ]
    await gate.do("POST", "/upstreams", {"name": "reserve", "base_url": url, "api_key": UPSTREAM_KEY})
    await gate.do(
        "POST", "/upstreams", {"name": "far-away", "base_url": "http://127.0.0.1:9", "priority": 20}
    )
    ledger, now = gate.stand.daemon.books, gate.stand.daemon.clock.now()
    assert ledger is not None
    for number in range(240):
        key, size = made[number % 3], 2_000 + (number * 7_919) % 30_000
        cached, written = size * (number % 5) // 6, 150 + size // 40
        at = int((now - (number * number % 29) * 86_400 - number * 37) * 1000)
        cost = (size - cached) * 1_250 + cached * 125 + written * 10_000
        tokens = {"input_tokens": size, "cached_tokens": cached, "output_tokens": written}
        model = ("gpt-5.5", "gpt-5.4-mini", "gpt-6.1-sol")[number % 7 % 3]
        target = NAMES[number % len(NAMES)]
        await ledger.ledger.settled(
            settlement(key["key"], f"req_{number:032x}", cost, at, model=model, target=target, **tokens)
        )
    return editor


async def _screens(stand: Stand, at: Tab, request_id: str, folder: Path, suffix: str) -> None:
    for name in ("now", "accounts", "horizon", "requests", "request", "cache", "setup"):
        await at.open(f"requests/{request_id}" if name == "request" else name)
        match name:
            case "now":
                # Some of its course is to be seen.
                for number in range(14):
                    await stand.ask(
                        f"again {number} " * (20 + 15 * (number % 5)), prompt_cache_key=f"now-{number % 3}"
                    )
                    await asyncio.sleep(0.55)
            case "accounts":
                await at.page.locator("tr.account").nth(8).wait_for()
                await at.page.locator("button.expand", has_text=NAMES[3]).click()
            case "requests":
                await work(stand, rounds=1)
                await at.page.locator("tr.request").nth(8).wait_for()
            case "request":
                await at.page.locator(".waterfall").wait_for()
            case "setup":
                await at.press("Send")
                await at.page.locator(".try-end.good").wait_for()
            case _:
                await asyncio.sleep(1.2)
        await at.page.evaluate("scrollTo(0, 0)")
        await at.page.mouse.move(0, 0)
        await at.page.screenshot(path=folder / f"{name}-{suffix}.png")


def shrink(folder: Path) -> None:
    """Leave each picture no more colours than it needs, where pngquant is there to do it."""
    program = shutil.which("pngquant")
    if program is not None:
        options = ("--force", "--nofs", "--speed", "1", "--strip", "--ext", ".png", "128")
        subprocess.run([program, *options, "--", *sorted(folder.glob("*.png"))], check=True)


if __name__ == "__main__":
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    asyncio.run(take(to))
    asyncio.run(gateway_pictures(to))
    shrink(to)
