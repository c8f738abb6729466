"""The table of accounts: what a person reads in it, and what is said below a row."""

from pathlib import Path
from typing import Any

import pytest

from codex_proxy import cli
from codex_proxy.commands.accounts import quota_in_words, table
from codex_proxy.commands.terminal import width
from codex_proxy.server.admin import AccountView, CreditsView, QuotaView, SpendView, WindowView, accounts_json
from tests.accounts.making import DAY, HOUR, NOW


def known(*views: AccountView, daemon: bool = True) -> dict[str, Any]:
    return {"daemon": daemon, **accounts_json(views, []), "uptime_seconds": 3 * HOUR}


def view(alias: str = "work", *, windows: tuple[WindowView, ...] = (), **more: Any) -> AccountView:
    quota = QuotaView(windows=windows) if windows else None
    return AccountView(alias, more.pop("status", "active"), quota=quota, plan_type="plus", **more)


SHORT = WindowView("5h", "codex", 300, 37.4, NOW + 2 * HOUR, "headers", 190.0)
WEEK = WindowView("week", "codex", 10_080, 81.0, NOW + 3 * DAY + HOUR, "usage", 30.0)


def row(one: AccountView, **more: Any) -> list[str]:
    return table(known(one, **more), NOW)[1].split()


def test_a_row_tells_all_of_an_account() -> None:
    one = view(windows=(SHORT, WEEK), token_expire=NOW + 9 * DAY, in_flight=2)
    assert table(known(one), NOW) == [
        "ALIAS PLAN STATE   5H RESETS   WEEK RESETS         SEEN TOKEN BUSY",
        "work  plus active 37% 2h 10:00  81% 3d1h Mon 09:00   3m    9d    2",
        "",
        "1 account: 1 active. The daemon has been running for 3h.",
    ]


def test_what_nobody_knows_is_a_question_mark() -> None:
    assert row(view()) == ["work", "plus", "active", "?", "?", "?", "?", "?", "?", "0"]


def test_a_window_that_has_started_again_is_unknown_and_not_full() -> None:
    over = WindowView("5h", "codex", 300, None, None, "headers", 20_000.0)
    assert row(view(windows=(over, WEEK)))[3:6] == ["?", "?", "81%"]


def test_windows_go_by_their_length_and_not_by_their_place() -> None:
    """Free plans have the week first, and some plans have windows of other lengths."""
    assert row(view(windows=(WEEK,)))[3:6] == ["?", "?", "81%"]
    month = WindowView("30d", "codex", 43_200, 5.0, None, "usage", 1.0)
    three = WindowView("3h", "codex", 180, 9.0, None, "usage", 1.0)
    assert row(view(windows=(month, three)))[3:7] == ["9%/3h", "?", "5%/30d", "?"]
    unnamed = (WindowView("primary", "codex", None, 1.0), WindowView("secondary", "codex", None, 2.0))
    assert row(view(windows=unnamed))[3:7] == ["1%", "?", "2%", "?"]


def test_limits_of_a_model_family_are_not_the_account_s() -> None:
    spark = WindowView("5h", "codex_spark", 300, 99.0, NOW + HOUR, "usage", 1.0)
    assert row(view(windows=(spark,)))[3] == "?"


@pytest.mark.parametrize(
    ("ends_at", "text"), [(None, "?"), (NOW - 1, "over"), (NOW, "over"), (NOW + HOUR, "1h")]
)
def test_the_end_of_the_token(ends_at: float | None, text: str) -> None:
    assert row(view(token_expire=ends_at))[8] == text


def test_without_a_daemon_nothing_is_in_flight() -> None:
    assert row(view(), daemon=False)[9] == "-"


@pytest.mark.parametrize(
    ("more", "remark"),
    [
        (
            {"status": "cooldown", "reason": "usage limit", "cooldown_until": NOW + 2 * HOUR},
            "cooldown: usage limit, until 10:00 (in 2h)",
        ),
        ({"status": "unavailable", "reason": "workspace deactivated"}, "unavailable: workspace deactivated"),
        (
            {"login": "uncertain", "login_reason": "an exchange was cut off"},
            "login uncertain: an exchange was cut off",
        ),
        # A valid access token serves to its end: the account is active, and its login lost.
        (
            {"login": "lost", "login_reason": "refresh_token_reused"},
            "login lost: refresh_token_reused; codex-proxy accounts relogin work",
        ),
        (
            {"status": "needs_login", "reason": "no usable token"},
            "needs login: no usable token; codex-proxy accounts relogin work",
        ),
        (
            {
                "status": "needs_login",
                "reason": "refresh_token_reused",
                "login": "lost",
                "login_reason": "refresh_token_reused",
            },
            "login lost: refresh_token_reused; codex-proxy accounts relogin work",
        ),
        ({"last_error": "refresh uncertain"}, "last error: refresh uncertain"),
        ({"status": "disabled", "reason": "disabled in its file"}, None),
        ({}, None),
    ],
)
def test_what_needs_words_is_said_below_the_row(more: dict[str, Any], remark: str | None) -> None:
    lines = table(known(view(**more)), NOW)
    assert lines[2:-2] == ([f"  {remark}"] if remark is not None else [])


def test_wide_names_keep_the_columns_straight() -> None:
    lines = table(known(view("日本のアカウント"), view("a"), view("naïve")), NOW)
    places = {width(line[: line.index("plus")]) for line in lines[1:4]}
    assert places == {17}


def test_colour_is_around_the_state_alone() -> None:
    lines = table(known(view("日本", status="cooldown"), view("active", status="active")), NOW, colour=True)
    assert lines[1].startswith("日本   plus \x1b[33mcooldown\x1b[0m ")
    assert lines[2].startswith("active plus \x1b[32mactive\x1b[0m ")
    plain = table(known(view("日本", status="cooldown"), view("active", status="active")), NOW)
    bare = [line.replace("\x1b[33m", "").replace("\x1b[32m", "").replace("\x1b[0m", "") for line in lines]
    assert bare == plain


def test_states_are_counted_and_problems_named() -> None:
    all_of_them = known(view("a"), view("b", status="needs_login"), view("c"), daemon=False)
    all_of_them["problems"] = [{"file": "x.json", "reason": "not JSON"}]
    assert table(all_of_them, NOW)[-6:] == [
        "",
        "Files of the auth-dir with something wrong:",
        "  x.json: not JSON",
        "",
        "3 accounts: 2 active, 1 needs login. The daemon is not running: this is what the",
        "files say.",
    ]
    all_of_them["accounts"] = []
    assert table(all_of_them, NOW)[0] == "Files of the auth-dir with something wrong:"
    assert table(known(daemon=False), NOW) == [
        "0 accounts. The daemon is not running: this is what the files say."
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["accounts", "disable"],
        ["accounts", "reset"],
        ["accounts", "check", "--all", "a1"],
        ["accounts", "explode", "a1"],
        ["accounts", "relogin", "a1", "a2"],
        ["accounts", "relogin", "a1", "--callback-port", "70000"],
        ["login", "--no-browser", "--device"],
        ["import"],
        ["logout"],
        ["why"],
        ["why", " "],
        ["accounts", "relogin", "a1", "--json"],
        ["accounts", "--json", "remove", "a1"],
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "usage: codex-proxy" in output.err


def test_no_line_is_wider_than_a_screen() -> None:
    """The moments go first, what is said below a row is wrapped, and an alias is never cut."""
    later = WindowView("30d", "codex", 43_200, 100.0, NOW + 6 * DAY + 23 * HOUR, "usage", 60.0)
    full = WindowView("5h", "codex", 300, 100.0, NOW + 20 * HOUR, "headers", 190.0)
    one = view(
        "somebody-at-work", windows=(full, later), token_expire=NOW + 9 * DAY + 23 * HOUR, status="needs_login",
        login="lost", login_reason="its refresh token was used before, perhaps by another program", reason="x",
        last_error="its token was not exchanged: the issuer could not be asked, or had a bad moment",
    )  # fmt: skip
    lines = table(known(one), NOW)
    assert max(map(width, lines)) <= 80
    assert lines[1].split()[5:8] == ["20h", "100%/30d", "6d23h"]
    assert " ".join(line.strip() for line in lines[2:]).startswith(
        "login lost: its refresh token was used before, perhaps by another program; codex-proxy accounts relogin"
        " somebody-at-work last error: "
    )
    plan = known(view())
    plan["accounts"][0]["plan_type"] = "self_serve_business_usage_based"
    assert table(plan, NOW)[1].split()[1] == "self_serve_…"


def test_what_others_wrote_does_not_steer_the_terminal() -> None:
    all_of_them = known(view("a", last_error="\x1b[2Jgone\nforged"))
    all_of_them["problems"] = [{"file": "\x9b5n.json", "reason": "odd"}]
    lines = table(all_of_them, NOW, colour=True)
    assert r"  \x9b5n.json: odd" in lines
    assert lines[2] == "\x1b[90m  last error: \\x1b[2Jgone\\nforged\x1b[0m"


@pytest.mark.parametrize(
    ("bought", "spend", "said"),
    [
        (None, None, []),
        (
            CreditsView(False, False, "0", False, "usage", 1.0),
            SpendView(False, None, None, None, None, "usage", 1.0),
            [],
        ),
        (CreditsView(True, False, "12.50", False, "usage", 1.0), None, ["credits: 12.50 left"]),
        (CreditsView(True, True, None, None, "usage", 1.0), None, ["credits: unlimited"]),
        (
            CreditsView(True, False, "", True, "event", 1.0),
            None,
            ["credits: some left; their own limit is reached"],
        ),
        (
            None,
            SpendView(True, "100", "100", 100.0, NOW + HOUR, "usage", 1.0),
            ["spending in the workspace: 100 of 100, 100% used, the limit is reached, resets in 1h (09:00)"],
        ),
    ],
)
def test_what_was_bought_is_told_with_the_quota(
    bought: CreditsView | None, spend: SpendView | None, said: list[str]
) -> None:
    one = AccountView("work", "active", quota=QuotaView(credits=bought, spend=spend))
    assert quota_in_words(known(one)["accounts"][0], NOW) == said


def test_the_usage_shows_that_the_action_may_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, usage in (
        (["-h"], "usage: codex-proxy [-h] [--version] [-config FILE] [COMMAND ...]"),
        (["accounts", "-h"], "usage: codex-proxy accounts [-h] [-config FILE] [--json] [ACTION ...]"),
        (["accounts", "disable", "-h"], "usage: codex-proxy accounts disable [-h] [-config FILE] [--json]"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert capsys.readouterr().out.startswith(usage)
