"""`codex-proxy accounts`, `logout` and `why` as processes: beside a running daemon, and without one."""

import asyncio
import contextlib
import errno
import io
import json
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from codex_proxy import cli
from codex_proxy.accounts import files, store
from codex_proxy.accounts.actions import Actions
from codex_proxy.accounts.upkeep import Keeper
from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.net import Outbound
from codex_proxy.simulator import SimAccount, Simulator
from codex_proxy.tasks import Background
from tests.accounts.making import NOW, make_pool, named, write_file
from tests.harness import Stand, standing
from tests.process import run, write_config


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for a socket's, which may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="cp-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
async def stand(short: Path) -> AsyncIterator[Stand]:
    async with standing(short, accounts=3, auths=with_aliases) as one:
        yield one


def with_aliases(sim: Simulator, folder: Path) -> None:
    for path, account in zip(sim.write_auth_files(folder), sim.accounts, strict=True):
        path.write_text(
            json.dumps({**account.flat_file(), "alias": account.name, "mine": [1]}), encoding="utf-8"
        )


async def command(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command as a process."""
    return await run("-config", str(folder / "config.yaml"), *arguments)


async def beside(stand: Stand, *arguments: str) -> tuple[int, str, str]:
    """Run a command beside a daemon, in a thread here: it is the same, and no process has to start."""
    return await asyncio.to_thread(_main, ["-config", str(stand.folder / "config.yaml"), *arguments])


def _main(arguments: list[str]) -> tuple[int, str, str]:
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "12")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return code, texts[0], texts[1]


async def good(where: Path | Stand, *arguments: str) -> str:
    """Run a command that succeeds, and return what it prints."""
    run_it = beside(where, *arguments) if isinstance(where, Stand) else command(where, *arguments)
    code, out, err = await run_it
    assert (code, err) == (0, "")
    return out


def file_of(folder: Path, account: SimAccount) -> Path:
    return folder / "auths" / f"simulated-{account.name}.json"


def content(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_bytes())
    assert isinstance(document, dict)
    return document


# --- beside a daemon


async def test_the_table_shows_what_the_daemon_knows(stand: Stand) -> None:
    stand.accounts[1].set("usage_limit", resets_in=7200)
    stand.in_order_of(stand.accounts[1])
    await stand.ask("hi")
    stand.accounts[0].use(37, 81)
    async with stand.session.post("/check-quota") as answer:
        await answer.read()
    out = await good(stand.folder, "accounts")
    head, first, second, *_ = out.splitlines()
    assert head.split() == [
        "ALIAS",
        "PLAN",
        "STATE",
        "5H",
        "RESETS",
        "WEEK",
        "RESETS",
        "SEEN",
        "TOKEN",
        "BUSY",
    ]
    assert [word for word in first.split() if word.endswith("%")] == ["37%", "81%"]
    assert first.split()[:3] == ["a1", "plus", "active"]
    assert second.split()[:3] == ["a2", "plus", "cooldown"]
    assert "  cooldown: usage limit, until " in out
    assert out.splitlines()[-1].startswith(
        "3 accounts: 2 active, 1 cooldown. The daemon has been running for "
    )
    assert max(map(len, out.splitlines())) <= 80
    assert "@" not in out

    told = json.loads(await good(stand, "accounts", "--json"))
    assert told["daemon"] is True
    assert [account["alias"] for account in told["accounts"]] == ["a1", "a2", "a3"]
    assert told["accounts"] == (await stand.stats())["accounts"]


async def test_disabled_counts_at_once_and_lets_running_streams_end(stand: Stand) -> None:
    account = stand.accounts[0]
    stand.in_order()
    account.script("one two three")
    async with stand.asking("sim:slow 20") as response:
        out = await good(stand, "accounts", "disable", "a1")
        assert out.startswith("a1: it takes no new requests")
        assert stand.known(account).state.value == "disabled"
        assert content(file_of(stand.folder, account))["disabled"] is True
        assert (await stand.ask("next")).status == 200
        assert stand.tried()[-1] != "a1"
        assert b"response.completed" in await response.read()
    assert await good(stand, "accounts", "disable", "a1") == "a1: it was disabled already\n"
    assert await good(stand, "accounts", "enable", "a1") == "a1: it takes requests again\n"
    assert stand.known(account).state.value == "ready"
    assert content(file_of(stand.folder, account)) == {**account.flat_file(), "alias": "a1", "mine": [1]}


async def test_a_disabled_account_is_refreshed_when_its_owner_says_so(stand: Stand) -> None:
    account = stand.accounts[0]
    await good(stand, "accounts", "disable", "a1")
    before = account.tokens.refresh
    assert await good(stand, "accounts", "refresh", "a1") == "a1: it has new tokens\n"
    file = content(file_of(stand.folder, account))
    assert file["refresh_token"] == account.tokens.refresh != before
    assert file["disabled"] is True
    # In a round over all it is left alone, and that is no failure.
    out = await good(stand, "accounts", "refresh", "--all")
    assert "a1: left out: disabled" in out
    assert out.endswith("2 of 3 succeeded, 1 left out.\n")


async def test_an_edit_during_an_exchange_loses_neither_side(stand: Stand) -> None:
    account = stand.accounts[0]
    account.set("ok", refresh="slow", refresh_seconds=1.0)
    exchange = stand.daemon.background.spawn(beside(stand, "accounts", "refresh", "a1"), name="refresh")
    await stand.until(lambda: len(stand.sim.exchanges) == 1, 20.0)
    await asyncio.to_thread(
        store.edit, file_of(stand.folder, account), lambda raw: {**raw, "note": "by hand"}
    )
    await good(stand, "accounts", "disable", "a1")
    assert (await exchange)[0] == 0
    file = content(file_of(stand.folder, account))
    assert file["refresh_token"] == account.tokens.refresh
    assert (file["disabled"], file["note"], file["mine"]) == (True, "by hand", [1])
    assert stand.known(account).state.value == "disabled"


async def test_a_refresh_that_fails_says_what_to_do(stand: Stand) -> None:
    stand.accounts[0].set("ok", refresh="invalidated")
    code, out, err = await beside(stand, "accounts", "refresh", "a1", "a2")
    assert (code, out) == (1, "a2: it has new tokens\n")
    assert (
        "a1: its login is lost: the issuer has ended the login (refresh_token_invalidated); log it in" in err
    )
    assert "codex-proxy accounts relogin a1" in err
    # Its owner may ask again.
    stand.accounts[0].set("ok")
    assert await good(stand, "accounts", "refresh", "a1") == "a1: it has new tokens\n"


async def test_remove_takes_an_account_out_and_keeps_its_file(stand: Stand) -> None:
    account = stand.accounts[0]
    before = content(file_of(stand.folder, account))
    code, out, err = await beside(stand, "accounts", "remove", "a1")
    assert (code, out) == (1, "")
    assert "Take a1 out of the pool? Nobody is there to answer: say --yes" in err

    out = await good(stand, "accounts", "remove", "a1", "--yes")
    removed = stand.folder / "data" / "removed"
    assert f"its file is now in {removed} as simulated-a1.json; move it back into " in out
    assert stat.S_IMODE(removed.stat().st_mode) == 0o700
    assert content(removed / "simulated-a1.json") == before
    assert not file_of(stand.folder, account).exists()
    assert stand.daemon.pool.by_alias("a1") is None
    os.rename(removed / "simulated-a1.json", file_of(stand.folder, account))
    await stand.until(lambda: stand.daemon.pool.by_alias("a1") is not None)


async def test_a_second_file_of_an_account_that_was_removed_is_named(stand: Stand) -> None:
    double = stand.auths / "older.json"
    raw = {**stand.accounts[0].flat_file(), "last_refresh": "2020-01-01T00:00:00Z"}
    await asyncio.to_thread(double.write_text, json.dumps(raw), encoding="utf-8")
    await stand.until(lambda: bool(stand.daemon.pool.problems))
    out = await good(stand, "accounts", "remove", "a1", "--yes")
    assert "It had a second file, older.json, which is in use now" in out


async def test_reset_ends_a_cooldown(stand: Stand) -> None:
    stand.accounts[0].set("usage_limit", resets_in=7200, times=1)
    stand.in_order()
    await stand.ask("hi")
    assert stand.known(stand.accounts[0]).state.value == "cooling"
    out = await good(stand, "accounts", "reset", "a1")
    assert out == "a1: its cooldowns are over, and what was learned of it is forgotten\n"
    assert stand.known(stand.accounts[0]).state.value == "ready"
    assert len((await good(stand, "accounts", "reset", "--all")).splitlines()) == 3


async def test_check_asks_for_the_quota_of_one_and_of_all(stand: Stand) -> None:
    stand.accounts[0].use(37, 81)
    out = await good(stand, "accounts", "check", "a1")
    first, *windows = out.splitlines()
    assert first == "a1: its quota was read"
    # Five hours, less the moment that has passed.
    assert windows[0].startswith(("  5h: 37% used, resets in 4h", "  5h: 37% used, resets in 5h"))
    assert windows[1].startswith(("  week: 81% used, resets in 6d", "  week: 81% used, resets in 7d"))
    assert [request.path for request in stand.sim.requests] == ["/backend-api/wham/usage"]
    stand.accounts[1].set("server_error", everywhere=True)
    code, out, _ = await beside(stand, "accounts", "check", "--all")
    assert code == 1
    assert "a2: failed: the answer was a 500" in out
    assert out.endswith("2 of 3 succeeded.\n")


async def test_logout_ends_the_login_at_the_issuer_and_leaves_no_token(stand: Stand) -> None:
    account = stand.accounts[0]
    secrets = (account.tokens.access, account.tokens.refresh, account.tokens.id_token)
    out = await good(stand, "logout", "a1", "--yes")
    assert "a1: the issuer has ended its login; its file is in " in out
    assert account.tokens.login.revoked
    assert not stand.sim.exchanges
    assert stand.daemon.pool.by_alias("a1") is None
    left = content(stand.folder / "data" / "removed" / "simulated-a1.json")
    assert left == {**account.flat_file(), "alias": "a1", "mine": [1]} | dict.fromkeys(
        ("access_token", "refresh_token", "id_token"), ""
    )
    for path in stand.folder.rglob("*.json"):
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path


async def test_a_logout_that_the_issuer_did_not_take_is_told_and_can_be_tried_again(stand: Stand) -> None:
    account = stand.accounts[0]
    stand.sim.issuer_state.revoke_status = 503
    code, out, err = await beside(stand, "logout", "a1", "--yes")
    assert (code, out) == (1, "")
    assert (
        "a1: the issuer did not end its login (The issuer has a bad day.), so whoever has its tokens may"
        in err
    )
    assert stand.daemon.pool.by_alias("a1") is None
    # With its tokens the login can still be ended.
    removed = stand.folder / "data" / "removed" / "simulated-a1.json"
    assert content(removed)["refresh_token"] == account.tokens.refresh
    assert stat.S_IMODE(removed.stat().st_mode) == 0o600
    assert f"move it back into {stand.auths} and log out once more" in err
    os.rename(removed, file_of(stand.folder, account))
    stand.sim.issuer_state.revoke_status = 200
    await stand.until(lambda: stand.daemon.pool.by_alias("a1") is not None)
    await good(stand, "logout", "a1", "--yes")
    assert account.tokens.login.revoked


async def test_a_logout_that_could_not_end_well_does_not_begin(stand: Stand) -> None:
    account = stand.accounts[0]
    await asyncio.to_thread((stand.folder / "data" / "removed").write_text, "in the way", encoding="utf-8")
    code, out, err = await beside(stand, "logout", "a1", "--yes")
    assert (code, out) == (1, "")
    assert "a1: nothing was done: the folder " in err
    assert "(below data-dir) cannot be made: file exists" in err
    assert not account.tokens.login.revoked
    assert stand.daemon.pool.by_alias("a1") is not None


async def test_a_logout_whose_file_stays_says_where_it_is(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(path: Path, folder: Path) -> Path:
        raise OSError(errno.EROFS, "")

    monkeypatch.setattr(files, "move", move)
    account = stand.accounts[0]
    code, out, err = await beside(stand, "logout", "a1", "--yes")
    assert (code, out) == (1, "")
    assert "a1: the issuer has ended its login, but the credential file was not moved: read-only" in err
    assert (
        f"its file is still in {stand.auths} as simulated-a1.json, with tokens that are good for nobody"
        in err
    )
    assert account.tokens.login.revoked
    # And nobody is sent there any more.
    assert stand.known(account).state.value == "needs-login"


async def test_a_logout_takes_a_symlink_away_and_leaves_what_it_leads_to(stand: Stand) -> None:
    account = stand.accounts[0]
    path, kept = file_of(stand.folder, account), stand.folder / "kept.json"
    os.rename(path, kept)
    path.symlink_to(kept)
    before = kept.read_bytes()
    out = await good(stand, "logout", "a1", "--yes")
    assert "what it leads to was left as it is, with tokens that are good for nobody" in out
    assert account.tokens.login.revoked
    assert kept.read_bytes() == before
    assert path.name not in os.listdir(stand.auths)


async def test_nobody_is_asked_about_an_account_that_there_is_not(stand: Stand) -> None:
    for arguments in (("logout", "a11"), ("accounts", "remove", "a1", "a11")):
        code, out, err = await beside(stand, *arguments)
        assert (code, out) == (1, "")
        assert "there is no account 'a11'; did you mean a1" in err
        assert "Nobody is there to answer" not in err
    assert stand.daemon.pool.by_alias("a1") is not None


async def test_what_was_done_is_told_as_json_before_and_after_the_action(stand: Stand) -> None:
    told = {"alias": "a1", "success": True, "message": "it takes no new requests"}
    assert json.loads(await good(stand, "accounts", "--json", "disable", "a1")) == told
    told["message"] = "it takes requests again"
    assert json.loads(await good(stand, "accounts", "enable", "--json", "a1")) == told
    code, out, err = await beside(stand, "accounts", "reset", "--json", "nobody", "a2")
    assert (code, err) == (1, "")
    first, second = (json.loads(line) for line in out.splitlines())
    assert (first["alias"], first["success"], second["alias"], second["success"]) == (
        "nobody",
        False,
        "a2",
        True,
    )
    # An argument need not be text.
    code, out, err = await beside(stand, "accounts", "reset", "--json", "\udcff")
    assert (code, json.loads(out)["success"], err) == (1, False, "")
    lines = (await good(stand, "accounts", "check", "--all", "--json")).splitlines()
    assert sorted(json.loads(line)["alias"] for line in lines) == ["a1", "a2", "a3"]


async def test_bought_credits_are_shown_with_their_source_and_age(stand: Stand) -> None:
    quota = stand.known(stand.accounts[0]).quota
    now = stand.daemon.clock.now()
    quota.read_usage(
        {
            "credits": {"has_credits": True, "unlimited": False, "balance": "12.50"},
            "spend_control": {
                "reached": False,
                "individual_limit": {"limit": "100", "used": "25", "used_percent": 25},
            },
        },
        now,
    )
    told = json.loads(await good(stand, "accounts", "--json"))["accounts"][0]["quota"]
    assert 0 <= told["credits"].pop("age") < 60
    assert told["credits"] == {
        "has_credits": True, "unlimited": False, "balance": "12.50", "overage_limit_reached": None, "source": "usage",
    }  # fmt: skip
    assert (told["spend"]["limit"], told["spend"]["used"], told["spend"]["source"]) == ("100", "25", "usage")


async def test_an_account_that_there_is_not_stops_nothing(stand: Stand) -> None:
    code, out, err = await beside(stand, "accounts", "disable", "A1", "a2", "zebra")
    assert (code, out) == (1, "a2: it takes no new requests\n")
    assert "codex-proxy: there is no account 'A1'; did you mean a1" in err
    assert "codex-proxy: there is no account 'zebra'; there are a1, a2, a3" in err


async def test_what_changes_an_account_is_not_served_on_the_network_without_an_admin_key(
    stand: Stand,
) -> None:
    for action in ("disable", "enable", "remove", "logout", "refresh", "reset", "check"):
        answer = await stand.post(f"/accounts/a1/{action}")
        assert (answer.status, answer.json["error"]["code"]) == (403, "admin_key_needed"), action
    assert len(list(stand.auths.glob("*.json"))) == 3


async def test_why_tells_the_story_of_a_request(stand: Stand) -> None:
    stand.in_order()
    stand.accounts[0].set("usage_limit", resets_in=7200)
    answer = await stand.ask("hi")
    request_id = answer.headers["x-request-id"]
    out = await good(stand, "why", request_id)
    first, second, *rest = out.splitlines()
    assert first.startswith(f"{request_id}: responses for gpt-5.5, streamed, asked by local at ")
    assert second.startswith("  answered by a")
    assert second.endswith(", 2 attempts")
    assert "   -> a1: exhausted, status 429" in out
    assert any("tried for this request" in line or "cooling" in line for line in rest)
    told = json.loads(await good(stand, "why", request_id, "--json"))
    assert [one["account"] for one in told["steps"][0]["attempts"]] == ["a1"]
    assert (await stand.stats())["decisions"][0]["id"] == request_id
    code, out, err = await beside(stand, "why", "req_unknown")
    assert (code, out) == (1, "")
    assert "no finished turn with the id 'req_unknown' is known" in err


# --- without one


@pytest.fixture
async def alone(short: Path) -> AsyncIterator[tuple[Path, Simulator]]:
    """A configuration, account files and a backend; no daemon."""
    async with Simulator(2) as sim:
        await asyncio.to_thread(with_aliases, sim, short / "auths")
        write_config(short, sim)
        yield short, sim


async def test_without_a_daemon_the_files_tell(alone: tuple[Path, Simulator]) -> None:
    folder, _ = alone
    (folder / "auths" / "broken.json").write_text("{", encoding="utf-8")
    out = await good(folder, "accounts")
    lines = out.splitlines()
    assert lines[1].split() == ["a1", "plus", "active", *"?????", "9d23h", "-"]
    assert "  broken.json: not JSON: " in out
    assert lines[-1] == "2 accounts: 2 active. The daemon is not running: this is what the files say."
    assert json.loads(await good(folder, "accounts", "--json"))["daemon"] is False


async def test_without_a_daemon_the_files_are_changed(alone: tuple[Path, Simulator]) -> None:
    folder, sim = alone
    first, second = sim.accounts
    before = first.tokens.refresh
    assert await good(folder, "accounts", "disable", "a1") == "a1: it takes no new requests\n"
    assert await good(folder, "accounts", "refresh", "a1") == "a1: it has new tokens\n"
    file = content(file_of(folder, first))
    assert (file["disabled"], file["mine"]) == (True, [1])
    assert file["refresh_token"] == first.tokens.refresh != before
    assert await good(folder, "accounts", "enable", "a1") == "a1: it takes requests again\n"
    assert "disabled" not in content(file_of(folder, first))
    assert (await good(folder, "accounts", "refresh", "--all")).endswith("2 of 2 succeeded.\n")
    await good(folder, "accounts", "remove", "a1", "--yes")
    await good(folder, "logout", "a2", "--yes")
    assert second.tokens.login.revoked
    assert not first.tokens.login.revoked
    assert sorted(path.name for path in (folder / "data" / "removed").iterdir()) == [
        "simulated-a1.json",
        "simulated-a2.json",
    ]
    out = await good(folder, "accounts")
    assert out.splitlines()[0] == "0 accounts. The daemon is not running: this is what the files say."
    assert "codex-proxy login" in out


async def test_an_auth_dir_that_is_not_there_is_a_problem(alone: tuple[Path, Simulator]) -> None:
    folder, _ = alone
    shutil.rmtree(folder / "auths")
    lines = (await good(folder, "accounts")).splitlines()
    assert lines[:2] == [
        "Files of the auth-dir with something wrong:",
        "  auths: folder not readable: no such file or directory",
    ]


async def test_numbers_learned_without_a_daemon_are_kept(alone: tuple[Path, Simulator]) -> None:
    folder, sim = alone
    sim.accounts[0].use(37, 81)
    await good(folder, "accounts", "check", "a1")
    row = (await good(folder, "accounts")).splitlines()[1].split()
    assert [word for word in row if word.endswith("%")] == ["37%", "81%"]


async def test_why_without_a_daemon_says_where_it_looked(alone: tuple[Path, Simulator]) -> None:
    folder, _ = alone
    code, out, err = await command(folder, "why", "req_1")
    assert (code, out) == (1, "")
    assert err == (
        f"codex-proxy: no daemon answers at {folder / 'data' / 'control.sock'}: is it running, with this configuration?"
        f" There are no records at {folder / 'data' / 'records.db'}: a daemon with this configuration keeps them there,"
        " while `records` is on\n"
    )


async def test_a_socket_that_a_dead_daemon_left_is_no_daemon(alone: tuple[Path, Simulator]) -> None:
    folder, _ = alone
    (folder / "data").mkdir()
    server = await asyncio.start_unix_server(
        lambda _, writer: writer.close(), folder / "data" / "control.sock"
    )
    server.close()
    await server.wait_closed()
    assert "The daemon is not running" in await good(folder, "accounts")


async def test_a_daemon_that_does_not_answer_is_not_taken_for_none(alone: tuple[Path, Simulator]) -> None:
    """Whoever goes on without it would change files under its feet."""
    folder, _ = alone
    (folder / "data").mkdir()
    async with await asyncio.start_unix_server(
        lambda _, writer: writer.close(), folder / "data" / "control.sock"
    ):
        code, _, err = await command(folder, "accounts", "disable", "a1")
    assert code == 1
    assert "the daemon went away or does not answer" in err
    assert "disabled" not in content(folder / "auths" / "simulated-a1.json")


# --- what no command can be made to meet in time


async def test_a_logout_waits_for_another_process_s_exchange_and_gives_up_in_the_end(tmp_path: Path) -> None:
    path = write_file(tmp_path / "auths", "a")
    pool, clock = make_pool()
    live, background = Live(Settings(auth_dir=tmp_path / "auths", data_dir=tmp_path / "data")), Background()
    outbound = Outbound(live)
    keeper = Keeper(pool, live=live, clock=clock, background=background, outbound=outbound)
    await keeper.load()
    actions = Actions(pool, keeper, live=live, clock=clock, outbound=outbound)
    assert isinstance(clock, ManualClock)
    with store.exchange_lock(named(pool, "a").credential):
        done = await actions.act("a", "logout")
    assert (done.success, done.message) == (False, "another process is exchanging its token; try again")
    assert clock.now() - NOW >= 35.0
    assert path.exists()
    assert pool.by_alias("a") is not None
    await background.aclose()
