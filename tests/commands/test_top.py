"""The terminal's screens: what they show of what the daemon says, and how keys change it."""

import asyncio
import contextlib
import io
import os
import pty
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from codex_proxy import cli
from codex_proxy.commands.top import Seen, View, screen
from codex_proxy.protocol.wire import JsonObject
from tests.accounts.making import NOW
from tests.harness import standing
from tests.process import write_config


def a_now(**more: Any) -> JsonObject:
    return {
        "at": NOW,
        "uptime_seconds": 3_700.0,
        "version": "1.2.3",
        "in_flight": 4,
        "streams": 3,
        "queued": 0,
        "requests_per_second": 1.25,
        "tokens_per_second": {"input": 12_345.0, "cached": 9_000.0, "output": 321.0},
        "error_share": None,
        "first_token_seconds": {"p50": 0.321, "p95": 2.5},
        "cached_share": 0.75,
        "loop_lag_seconds": {"p50": 0.001, "max": 0.0123},
        "accounts": {"total": 2, "active": 1, "cooldown": 1, "unavailable": 0, "needs_login": 0, "disabled": 0},
        "alerts": [],
        **more,
    }  # fmt: skip


def window(minutes: int, used: float | None, resets_at: str | None = "2027-01-15T10:00:00Z") -> JsonObject:
    return {"limit": "codex", "minutes": minutes, "used_percent": used, "resets_at": resets_at}


def an_account(alias: str, *windows: JsonObject, status: str = "active", **more: Any) -> JsonObject:
    return {
        "alias": alias,
        "status": status,
        "in_flight": 1,
        "total_requests": 12,
        "total_errors": 0,
        "cooldown_until": None,
        "reason": None,
        "quota": {"windows": list(windows)},
        **more,
    }


def a_seen(*accounts: JsonObject, total: int | None = None, **more: Any) -> Seen:
    stats = {
        "accounts": list(accounts),
        "pagination": {"filtered_total": len(accounts) if total is None else total},
        "problems": [],
    }
    return Seen(a_now(**more), stats, NOW)


def shown(seen: Seen, view: View | None = None, *, height: int | None = None, width: int = 120) -> list[str]:
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(screen(seen, view or View(), NOW + 5, width, height))
    return text.getvalue().splitlines()


def test_everything_is_told_in_words_and_bars() -> None:
    seen = a_seen(
        an_account("work", window(300, 50.0), window(10_080, 97.0)),
        an_account(
            "home",
            window(300, None, None),
            status="cooldown",
            cooldown_until="2027-01-15T08:30:00Z",
            reason="its limit",
        ),
    )
    # Fifteen steps are three columns.
    seen.points = [[NOW, step // 5, 0, 0, 0, 0, 0.5, 0.0] for step in range(15)]
    lines = [line.rstrip() for line in shown(seen)]
    assert lines[0] == "codex-proxy 1.2.3  up 1h1m"
    assert lines[1] == "in flight 4   streams 3   queued 0   requests/s 1.2   errors ?"
    assert lines[2] == "tokens/s in 12k   out 321.0   cached 75.0%"
    assert lines[3] == "first token p50 321ms   p95 2.5s   loop lag 12ms"
    assert lines[4].startswith("total 2   active 1   cooldown 1   unavailable 0   needs login 0   disabled 0")
    assert lines[5] == "requests     ▅█"
    assert lines[6] == "first token ███"
    # In the order of their names.
    assert re.match(r"home +◐ rests 29m +\? +\? +1 +12 +0 +its limit$", lines[9])
    assert re.match(r"work +● active +█████░░░░░  50% \w+ +██████████  97% \w+ +1 +12 +0$", lines[10])
    assert lines[-1] == "2 accounts; sorted by alias"
    narrow = [line.rstrip() for line in shown(seen, width=80)]
    assert re.match(r"home +◐ rests 29m +\? +\? +1 +12$", narrow[9])
    assert re.match(r"work +● active +██░░  50% \w+ +████  97% \w+ +1 +12$", narrow[10])


def test_keys_sort_and_move_and_end() -> None:
    accounts = [an_account(f"a{place:02}", window(300, float(place))) for place in range(30)]
    seen, view = a_seen(*accounts), View()
    lines = shown(seen, view, height=20)
    assert len(lines) <= 20
    assert lines[9].startswith("a00")
    assert lines[-1].startswith("1 to 9 of 30; sorted by alias")
    view.press("j\x1b[Bz")
    assert shown(seen, view, height=20)[9].startswith("a02")
    view.press("s")
    assert shown(seen, view, height=20)[9].startswith("a27")
    view.press("kkkk")
    assert shown(seen, view, height=20)[9].startswith("a29")
    view.press("j" * 100)
    assert shown(seen, view, height=20)[-1].startswith("22 to 30 of 30; sorted by used")
    # Smaller than anything fits.
    assert shown(seen, view, height=3)[-1].startswith("22 to 22 of 30")
    assert not view.is_over
    view.press("q")
    assert view.is_over


def test_alerts_old_numbers_and_more_than_fit_are_said() -> None:
    seen = a_seen(an_account("a"), total=2_000, alerts=[{"name": "x", "text": "pool nearly dry"}])
    seen.trouble = "no daemon answers"
    lines = shown(seen)
    assert lines[0].rstrip() == "codex-proxy 1.2.3  up 1h1m  no daemon answers; this is 5s old"
    assert "! pool nearly dry" in lines[7]
    assert lines[-1].startswith("1 to 1 of 2000, name some with --filter")


def test_before_the_first_answer_there_is_a_word() -> None:
    assert shown(Seen(trouble="no daemon answers")) == ["no daemon answers"]


def test_what_steers_a_terminal_is_spelled_out() -> None:
    lines = shown(a_seen(an_account("a", reason="\x1b]0;x\x07")))
    assert not any("\x1b" in line for line in lines)


async def test_of_a_running_daemon_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with standing(tmp_path, accounts=2) as stand:
        assert (await stand.ask()).status == 200
        file = str(tmp_path / "config.yaml")
        assert await asyncio.to_thread(cli.main, ["top", "-config", file]) == 0
        out = capsys.readouterr().out
        assert "total 2   active 2" in out
        for account in stand.daemon.pool.accounts():
            assert account.alias in out
        assert await asyncio.to_thread(cli.main, ["top", "-config", file, "--filter", "nobody"]) == 0
        assert "0 accounts" in capsys.readouterr().out


def test_without_a_daemon_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "-config", str(write_config(tmp_path))]) == 1
    assert "no daemon answers" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "x", "-1", "1e9", "nan"])
def test_an_interval_that_makes_no_sense(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["top", "--interval", value])
    assert exit_.value.code == 2
    assert "0.2 to 3600" in capsys.readouterr().err


async def test_in_a_terminal_it_draws_and_gives_the_terminal_back(tmp_path: Path) -> None:
    async with standing(tmp_path, accounts=1):
        master, slave = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "codex_proxy", "top", "-config", str(tmp_path / "config.yaml"), "--interval", "0.2",
            stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
        )  # fmt: skip
        os.close(slave)
        os.set_blocking(master, False)
        drawn = b""
        try:
            async with asyncio.timeout(20):
                while b"sorted by alias" not in drawn:
                    with contextlib.suppress(BlockingIOError):
                        drawn += os.read(master, 65_536)
                    await asyncio.sleep(0.02)
                os.write(master, b"sq")
                while process.returncode is None:
                    with contextlib.suppress(BlockingIOError, OSError):
                        drawn += os.read(master, 65_536)
                    await asyncio.sleep(0.02)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            with contextlib.suppress(OSError):
                drawn += os.read(master, 65_536)
            os.close(master)
        assert process.returncode == 0, drawn
        # The alternate screen is left again.
        assert drawn.rindex(b"\x1b[?1049l") > drawn.rindex(b"\x1b[?1049h")
