"""Logins that lie elsewhere: what is found in which source, and what becomes of it in auth-dir."""

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import store
from codex_proxy.accounts.importing import Brought, bring, read
from tests.accounts.making import DAY, HOUR, NOW, access_token, read_file

EARLIER, LATER = "2027-01-14T00:00:00Z", "2027-01-15T00:00:00Z"


def flat(user: str = "a", *, n: int = 0, **more: Any) -> dict[str, Any]:
    """Return an account as the Go daemon keeps it."""
    return {
        "access_token": access_token(user, n=n),
        "refresh_token": f"rt_{user}_{n}",
        "account_id": f"acc-{user}",
        "email": f"{user}@example.com",
        "type": "codex",
        "last_refresh": EARLIER,
        **more,
    }


def of_cli(user: str = "a", *, n: int = 0, **more: Any) -> dict[str, Any]:
    """Return an account as the Codex CLI keeps it."""
    return {
        "auth_mode": "chatgpt",
        "OPENAI_API_KEY": None,
        "tokens": {
            "access_token": access_token(user, n=n),
            "refresh_token": f"rt_{user}_{n}",
            "id_token": "",
            "account_id": f"acc-{user}",
            "login_owner_id": "owner",
        },
        "last_refresh": EARLIER,
        **more,
    }


class Desk:
    """A folder of sources, and an auth-dir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.auths = folder / "auths"

    def write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def bring(self, *paths: Path) -> list[Brought]:
        return list(bring(read(paths), self.auths, now=NOW))

    def outcomes(self, *paths: Path) -> list[str]:
        return [one.outcome for one in self.bring(*paths)]

    def reasons(self, *paths: Path) -> list[str]:
        brought = self.bring(*paths)
        assert {one.outcome for one in brought} == {"refused"}
        return [one.reason for one in brought]

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.auths.glob("*.json"))


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


# --- sources


@pytest.mark.parametrize("content", [flat(), of_cli()])
def test_a_whole_file_is_copied_with_all_it_holds(desk: Desk, content: dict[str, Any]) -> None:
    content |= {"future": {"x": [1, 2.5, 12345678901234567890]}, "note": "日本"}
    source = desk.write("mine.json", content)
    before = source.read_bytes()
    (brought,) = desk.bring(source)
    assert brought.outcome == "imported"
    assert brought.is_of_the_cli is ("tokens" in content)
    assert desk.files == ["mine.json"]
    copy = desk.auths / "mine.json"
    assert read_file(copy) == content
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert source.read_bytes() == before, "the source is only read"


@pytest.mark.parametrize("name", ["auth.json", "jane.doe@example.com.json"])
def test_a_name_that_says_nothing_or_too_much_is_not_kept(desk: Desk, name: str) -> None:
    (brought,) = desk.bring(desk.write(name, flat("jane", email="jane.doe@example.com")))
    assert brought.credential is not None
    assert desk.files == [f"{brought.credential.default_alias}.json"]
    assert "jane.doe" not in brought.item.place


def test_names_that_clash_are_told_apart(desk: Desk) -> None:
    assert (
        desk.outcomes(desk.write("1/x.json", flat("a")), desk.write("2/x.json", flat("b")))
        == ["imported"] * 2
    )
    assert desk.files == ["x-2.json", "x.json"]


def test_a_folder_gives_every_account_file_in_it_and_nothing_below(desk: Desk) -> None:
    desk.write("from/a.json", flat("a"))
    desk.write("from/B.JSON", flat("b"))
    desk.write("from/many.jsonl", json.dumps(flat("c")) + "\n")
    desk.write("from/readme.txt", "no account")
    desk.write("from/.hidden.json", flat("d"))
    desk.write("from/deeper/e.json", flat("e"))
    assert [(one.outcome, Path(one.item.place).name) for one in desk.bring(desk.folder / "from")] == [
        ("imported", "B.JSON"),
        ("imported", "a.json"),
        ("imported", "many.jsonl line 1"),
    ]


def test_a_folder_that_is_called_like_a_file_stops_nothing(desk: Desk) -> None:
    desk.write("from/a.json", flat("a"))
    desk.write("from/x.json/inner.json", flat("x"))
    desk.write("from/z.json", flat("z"))
    assert [(one.outcome, one.reason) for one in desk.bring(desk.folder / "from")] == [
        ("imported", ""),
        ("refused", "a folder, not a file"),
        ("imported", ""),
    ]


def test_an_empty_folder_is_told(desk: Desk) -> None:
    (desk.folder / "from").mkdir()
    assert desk.reasons(desk.folder / "from") == ["no account file in this folder"]


@pytest.mark.parametrize(("folder", "trace"), [(".codex", "version.json"), ("codex-home", "config.toml")])
def test_of_the_cli_s_own_folder_only_its_login_is_taken(desk: Desk, folder: str, trace: str) -> None:
    desk.write(f"{folder}/auth.json", of_cli())
    desk.write(f"{folder}/{trace}", "{}")
    desk.write(f"{folder}/models_cache.json", {"models": []})
    desk.write(f"{folder}/history.jsonl", '{"text": "hello"}\n')
    (brought,) = desk.bring(desk.folder / folder)
    assert (brought.outcome, brought.is_of_the_cli) == ("imported", True)
    assert Path(brought.item.place).name == "auth.json"


def test_lines_are_accounts_of_their_own(desk: Desk) -> None:
    lines = [json.dumps(flat("a", note="a\u2028b")), "", json.dumps(of_cli("b")), "  ", json.dumps(flat("c"))]
    for name in ("accounts.jsonl", "accounts.txt"):
        source = desk.write(name, "\ufeff" + "\r\n".join(lines))
        assert [Path(one.item.place).name for one in desk.bring(source)] == [
            f"{name} line {number}" for number in (1, 3, 5)
        ]
    assert len(desk.files) == 3


def test_a_list_is_accounts(desk: Desk) -> None:
    source = desk.write("all.json", json.dumps([flat("a"), "nonsense", of_cli("b"), {}], indent=2))
    assert [(one.outcome, one.reason) for one in desk.bring(source)] == [
        ("imported", ""),
        ("refused", "not a JSON object"),
        ("imported", ""),
        ("refused", "holds neither an access token nor a refresh token"),
    ]


def test_one_account_on_many_lines_is_one(desk: Desk) -> None:
    assert desk.outcomes(desk.write("one.json", json.dumps(flat(), indent=2))) == ["imported"]


def test_the_go_daemon_s_other_name_of_the_token_is_known(desk: Desk) -> None:
    content = flat()
    content["rk"] = content.pop("refresh_token")
    (brought,) = desk.bring(desk.write("a.json", content))
    assert brought.credential is not None
    assert brought.credential.refresh.reveal() == "rt_a_0"


@pytest.mark.parametrize("name", ["a.json.disabled", "a.json.disabled.3"])
def test_what_the_go_daemon_put_aside_comes_disabled(desk: Desk, name: str) -> None:
    desk.write(f"from/{name}", flat())
    (brought,) = desk.bring(desk.folder / "from")
    assert (brought.outcome, brought.notes) == ("imported", ("it is disabled",))
    assert desk.files == ["a.json"]
    assert read_file(desk.auths / "a.json")["disabled"] is True


# --- what is refused


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        ("  \n ", "empty"),
        ("[]", "an empty list"),
        ("[1, 2", "not JSON: Expecting ',' delimiter at line 1 column 6"),
        ('{\n  "access_token": ,\n}', "not JSON: Expecting value at line 2 column 19"),
        ('{"a": "b', "not JSON: Unterminated string starting at line 1 column 7"),
        ('["b', "not JSON: Unterminated string starting at line 1 column 2"),
        ('"text"', "not a JSON object"),
        ("{}", "holds neither an access token nor a refresh token"),
        ('{"access_token": 7}', "access_token is not a token"),
        (
            '{"OPENAI_API_KEY": "sk-secret-1234567"}',
            "holds an API key and no ChatGPT login; only logins can be pooled",
        ),
        (
            '{"refresh_token": "rt_1", "proxy-url": "nonsense"}',
            "proxy-url is no address: scheme://host:port would do",
        ),
        ('{"refresh_token": "rt_1", "x": NaN}', "not JSON: a number out of range"),
        ("[" * 5_000, "not JSON"),
        ('{"a":' * 5_000, "not JSON: nested too deep"),
        ('{"refresh_token": "rt_1", "x": "' + "y" * 2**20 + '"}', "larger than 1 MiB"),
    ],
)
def test_what_is_no_account_is_refused_with_its_place(desk: Desk, content: str, reason: str) -> None:
    reasons = desk.reasons(desk.write("bad.json", content))
    assert [text[: len(reason)] for text in reasons] == [reason]
    assert "secret" not in reasons[0]
    assert desk.files == []


def test_a_broken_line_does_not_stop_the_others(desk: Desk) -> None:
    source = desk.write("all.jsonl", '{"access_token": \n' + json.dumps(flat()) + "\n[]\n")
    assert [(one.item.place.rpartition(" ")[2], one.outcome, one.reason) for one in desk.bring(source)] == [
        ("1", "refused", "not JSON: Expecting value at column 18"),
        ("2", "imported", ""),
        ("3", "refused", "not a JSON object"),
    ]


def test_what_cannot_be_read_is_refused(desk: Desk) -> None:
    pipe = desk.folder / "pipe.json"
    os.mkfifo(pipe)
    (desk.folder / "latin.json").write_bytes(b'{"x": "\xe9"}')
    (desk.folder / "loop.json").symlink_to(desk.folder / "loop.json")
    names = ["pipe.json", "latin.json", "nowhere.json", "loop.json"]
    assert desk.reasons(*(desk.folder / name for name in names)) == [
        "not a regular file",
        "not UTF-8 at byte 7",
        "not readable: no such file or directory",
        "not readable: too many levels of symbolic links",
    ]


# --- the same account again


def test_an_account_that_is_there_gets_newer_tokens_and_keeps_all_else(desk: Desk) -> None:
    desk.bring(desk.write("a.json", flat("a", alias="work", priority=3, mine=True)))
    newer = desk.write("other.json", flat("a", n=1, last_refresh=LATER, alias="other"))
    assert desk.outcomes(newer) == ["updated"]
    assert desk.files == ["a.json"]
    file = read_file(desk.auths / "a.json")
    assert (file["refresh_token"], file["access_token"]) == ("rt_a_1", access_token("a", n=1))
    assert (file["alias"], file["priority"], file["mine"]) == ("work", 3, True)
    assert file["last_refresh"].startswith("2027-01-15T00:00:00")


@pytest.mark.parametrize(
    "again", [flat("a"), flat("a", n=1, last_refresh="2027-01-13T00:00:00Z"), of_cli("a")]
)
def test_an_account_that_is_there_with_tokens_as_good_stays_as_it_is(
    desk: Desk, again: dict[str, Any]
) -> None:
    desk.bring(desk.write("a.json", flat("a")))
    before = (desk.auths / "a.json").read_bytes()
    assert desk.outcomes(desk.write("again.json", again)) == ["already there"]
    assert (desk.auths / "a.json").read_bytes() == before
    assert desk.files == ["a.json"]


@pytest.mark.parametrize("is_newer_first", [True, False])
def test_one_account_twice_in_an_import_is_one(desk: Desk, is_newer_first: bool) -> None:
    sources = [desk.write("1.json", flat("a")), desk.write("2.json", of_cli("a", n=1, last_refresh=LATER))]
    if is_newer_first:
        assert desk.outcomes(*reversed(sources)) == ["imported", "already there"]
    else:
        assert desk.outcomes(*sources) == ["imported", "updated"]
    (file,) = desk.files
    assert store.load(desk.auths / file).refresh.reveal() == "rt_a_1"


def test_two_files_of_one_refresh_token_are_one_account(desk: Desk) -> None:
    bare = {"refresh_token": "rt_a_0"}
    assert desk.outcomes(desk.write("1.json", flat("a")), desk.write("2.json", bare)) == [
        "imported",
        "already there",
    ]
    assert len(desk.files) == 1


def test_two_workspaces_of_one_person_are_two_accounts(desk: Desk) -> None:
    one, other = flat("a"), flat("a", n=1, account_id="acc-team")
    assert desk.outcomes(desk.write("1.json", one), desk.write("2.json", other)) == ["imported"] * 2


def test_what_the_daemon_exchanged_meanwhile_is_not_put_back(desk: Desk) -> None:
    """A look taken before an import began says nothing of the tokens that are there when its turn comes."""

    def sources() -> Iterator[Path]:
        yield desk.write("x.json", flat("x"))
        # The daemon's exchange, in the middle of the import.
        desk.write("auths/a.json", flat("a", n=9, last_refresh="2027-01-16T00:00:00Z"))
        yield desk.write("a.json", flat("a", n=1, last_refresh=LATER))

    desk.write("auths/a.json", flat("a"))
    outcomes = [one.outcome for one in bring(read(sources()), desk.auths, now=NOW)]
    assert outcomes == ["imported", "already there"]
    assert read_file(desk.auths / "a.json")["refresh_token"] == "rt_a_9"


# --- what its owner should know


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (flat(refresh_token=""), "it has no refresh token, so it serves only until its access token ends"),
        (
            flat(refresh_token="", access_token=access_token("a", ends=NOW - HOUR)),
            "it has no refresh token and its access token is over: log it in",
        ),
        (flat(disabled=True), "it is disabled"),
        (flat(alias="a@b"), "alias is left out: up to 64 printable characters without '@' would do"),
    ],
)
def test_what_is_odd_about_an_account_is_told(desk: Desk, content: dict[str, Any], note: str) -> None:
    (brought,) = desk.bring(desk.write("a.json", content))
    assert (brought.outcome, brought.notes) == ("imported", (note,))


def test_an_import_of_thousands_takes_moments(desk: Desk) -> None:
    lines = "\n".join(json.dumps(flat(f"u{n}", ends=NOW + DAY)) for n in range(1_000))
    source = desk.write("all.jsonl", lines)
    started = time.monotonic()
    assert desk.outcomes(source) == ["imported"] * 1_000
    first = time.monotonic() - started
    assert desk.outcomes(source) == ["already there"] * 1_000
    # With a look at the folder for each it would take minutes.
    assert first < 20.0
