"""Credential files: read whatever is there, and never lose what they hold."""

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import files, store
from codex_proxy.accounts.pending import Pending
from codex_proxy.accounts.store import Credential, SaveFailed, Unusable, Vanished
from codex_proxy.accounts.tokens import NewTokens, Secret
from tests.accounts.logins import HOUR, NOW, access, auth, codex, flat, jwt, new_tokens, read, write


@pytest.fixture
def auths(tmp_path: Path) -> Path:
    folder = tmp_path / "auths"
    folder.mkdir()
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


# -- reading ------------------------------------------------------------------------------


def test_a_file_of_the_go_daemon_is_read(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    assert credential.shape == "flat"
    assert credential.refresh == Secret("rt_user-1_acc-1_1")
    assert credential.expires_at == NOW + HOUR
    assert credential.last_refresh == NOW
    assert credential.identity.user_id == "user-1"
    assert credential.identity.account_id == "acc-1"
    assert credential.identity.email == "user-1@example.com"
    assert credential.identity.plan == "plus"
    assert not credential.disabled


def test_a_file_of_the_codex_cli_is_read(auths: Path) -> None:
    credential = store.load(write(auths / "auth.json", codex()))
    assert credential.shape == "codex"
    assert credential.refresh == Secret("rt_1")
    assert credential.identity.email == "jane@example.com"
    assert credential.last_refresh == pytest.approx(1_795_220_108.16, abs=0.01)


def test_both_shapes_of_one_login_are_one_account(auths: Path) -> None:
    one = store.load(write(auths / "a.json", codex()))
    other = store.load(write(auths / "b.json", flat()))
    assert one.key == other.key
    assert one.default_alias == other.default_alias


@pytest.mark.parametrize(
    "content",
    [
        {"rk": "rt_1"},
        {"refresh_token": "", "rk": "rt_1"},
        {"refresh_token": " rt_1\n"},
        {"access_token": None, "refresh_token": "rt_1"},
        {"tokens": {}, "refresh_token": "rt_1"},
        {"tokens": None, "refresh_token": "rt_1"},
        {"tokens": {"refresh_token": "rt_1"}},
    ],
)
def test_a_refresh_token_is_enough(auths: Path, content: dict[str, Any]) -> None:
    credential = store.load(write(auths / "a.json", content))
    assert credential.refresh == Secret("rt_1")
    assert not credential.access
    assert credential.expires_at is None


def test_an_access_token_is_enough(auths: Path) -> None:
    credential = store.load(
        write(auths / "a.json", {"access_token": "opaque", "expired": "2027-01-15T10:00:00+02:00"})
    )
    assert not credential.refresh
    assert credential.expires_at == NOW


def test_what_the_file_says_of_the_workspace_counts_and_the_token_knows_the_plan(auths: Path) -> None:
    content = flat(account_id="chosen", email="mine@example.com", plan_type="free")
    identity = store.load(write(auths / "a.json", content)).identity
    assert (identity.account_id, identity.email, identity.plan) == ("chosen", "mine@example.com", "plus")


@pytest.mark.parametrize(
    ("expired", "expected"),
    [
        ("2027-01-15T08:00:00Z", NOW),
        ("2027-01-15T16:00:00.5+08:00", NOW + 0.5),
        ("2027-01-15T08:00:00", NOW),
        (1_800_000_000, NOW),
        ("0001-01-01T00:00:00Z", None),
        ("0001-01-01T00:00:00+08:00", None),
        ("9999-12-31T23:59:59-23:00", None),
        ("", None),
        ("soon", None),
        ([], None),
    ],
)
def test_times_are_read_as_people_write_them(auths: Path, expired: object, expected: float | None) -> None:
    path = write(auths / "a.json", {"access_token": "opaque", "expired": expired, "last_refresh": expired})
    assert store.load(path).expires_at == expected
    assert store.load(path).last_refresh == expected


def test_a_workspace_is_an_account_of_its_own(auths: Path) -> None:
    write(auths / "a.json", flat("jane", "home"))
    write(auths / "b.json", flat("jane", "work"))
    write(auths / "c.json", flat("john", "work"))
    scan = store.scan(auths)
    assert not scan.problems
    assert len({credential.key for credential in scan.credentials}) == 3


def test_a_file_that_names_no_account_is_known_by_its_place(auths: Path) -> None:
    path = write(auths / "a.json", {"refresh_token": "rt_1", "email": "jane@example.com"})
    other = write(auths / "b.json", {"refresh_token": "rt_2", "email": "jane@example.com"})
    before = store.load(path).key
    assert before != store.load(other).key
    write(path, {"refresh_token": "rt_9", "email": "jane@example.com"})
    assert store.load(path).key == before


def test_the_alias_stays_when_the_plan_changes(auths: Path) -> None:
    before = store.load(write(auths / "a.json", flat()))
    content = flat(id_token=jwt(**auth(plan="pro")), access_token=jwt(**auth(plan="pro")))
    after = store.load(write(auths / "a.json", content))
    assert (before.identity.plan, after.identity.plan) == ("plus", "pro")
    assert before.default_alias == after.default_alias
    assert "user" not in after.default_alias


BROKEN: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b" \n", "empty"),
    (b"{", "not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
    (b'{"refresh_token": "rt_secret",\n oops}', "not JSON: Expecting property name enclosed in double quotes at line 2 column 2"),
    (b'{"refresh_token": "rt_secret"', "not JSON: Expecting ',' delimiter at line 1 column 30"),
    (b'{"x": NaN}', "not JSON: a number out of range"),
    (b'{"x": 1e999}', "not JSON: a number out of range"),
    (b'{"x": ' + b"9" * 5000 + b"}", "not JSON: a number out of range"),
    (b"[" * 200_000, "not JSON: nested too deep"),
    (b'{"refresh_token": "\xff"}', "not UTF-8 at byte 19"),
    (b"[]", "not a JSON object"),
    (b'"rt_secret"', "not a JSON object"),
    (b"{}", "holds neither an access token nor a refresh token"),
    (b'{"id_token": "a.b.c"}', "holds neither an access token nor a refresh token"),
    (b'{"tokens": {"id_token": "x"}}', "holds neither an access token nor a refresh token"),
    (b'{"OPENAI_API_KEY": "sk-secret", "tokens": null}', "holds an API key and no ChatGPT login; only logins can be pooled"),
    (b'{"refresh_token": 7}', "refresh_token is not a token"),
    (b'{"refresh_token": "rt_1", "access_token": "rt_secret\\r\\nx: y"}', "access_token is not a token"),
    (b" " * (1024 * 1024) + b'{"refresh_token": "rt_1"}', "larger than 1 MiB"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), BROKEN)
def test_a_broken_file_is_named_and_the_rest_goes_on(auths: Path, content: bytes, reason: str) -> None:
    write(auths / "jane@example.com.json", content)
    write(auths / "z.json", flat())
    scan = store.scan(auths)
    assert [credential.path.name for credential in scan.credentials] == ["z.json"]
    assert [str(problem) for problem in scan.problems] == [f"j***@e***.com.json: {reason}"]
    assert scan.problems[0].skipped
    assert "secret" not in repr(scan.problems)
    assert (auths / "jane@example.com.json").read_bytes() == content


def test_what_is_no_file_is_named(auths: Path) -> None:
    (auths / "folder.json").mkdir()
    (auths / "gone.json").symlink_to(auths / "nowhere")
    (auths / "loop.json").symlink_to("loop.json")
    os.mkfifo(auths / "pipe.json")
    scan = store.scan(auths)
    assert not scan.credentials
    assert [str(problem) for problem in scan.problems] == [
        "folder.json: a folder, not a file",
        "gone.json: symlink to a file that is not there",
        "loop.json: symlink that leads to itself",
        "pipe.json: not a regular file",
    ]


def test_an_unreadable_file_is_named(auths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(auths / "a.json", flat())
    monkeypatch.setattr(os, "open", refuse(errno.EACCES))
    assert [str(problem) for problem in store.scan(auths).problems] == [
        "a.json: not readable: permission denied"
    ]


def refuse(code: int) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), "/home/jane@example.com")

    return fail


def test_a_folder_that_is_not_there_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    scan = store.scan(tmp_path / "none")
    assert not scan.credentials
    assert [str(problem) for problem in scan.problems] == [
        "none: folder not readable: no such file or directory"
    ]
    assert store.scan(write(tmp_path / "file", b"")).problems


def test_only_json_files_of_the_folder_itself_are_read(auths: Path) -> None:
    write(auths / "B.JSON", flat("b"))
    write(auths / "a.json", flat("a"))
    for name in (
        ".hidden.json",
        "a.json.bak",
        "a.json.disabled",
        "notes.txt",
        ".codex-proxy-1.tmp",
        "sub/c.json",
    ):
        write(auths / name, flat("c"))
    scan = store.scan(auths)
    assert [credential.path.name for credential in scan.credentials] == ["B.JSON", "a.json"]
    assert not scan.problems


def test_a_byte_order_mark_does_no_harm(auths: Path) -> None:
    write(auths / "a.json", b"\xef\xbb\xbf" + json.dumps(flat()).encode())
    assert len(store.scan(auths).credentials) == 1


def test_a_part_that_is_no_use_is_named_and_the_file_still_loads(auths: Path) -> None:
    wrong: dict[str, Any] = {"alias": "jane@example.com", "disabled": "yes", "account_id": [1]}
    write(auths / "a.json", flat(**wrong))
    scan = store.scan(auths)
    [credential] = scan.credentials
    assert credential.alias is None
    # Whoever wrote "yes" wanted it off.
    assert credential.disabled
    assert credential.identity.account_id == "acc-1"
    assert len(scan.problems) == len(wrong)
    assert not any(problem.skipped for problem in scan.problems)
    assert "jane" not in str([str(problem) for problem in scan.problems])


@pytest.mark.parametrize("value", ["proxy.example", "proxy.example:8080", 7, "http://two words"])
def test_a_file_whose_proxy_cannot_be_one_is_not_used_without_it(auths: Path, value: Any) -> None:
    write(auths / "a.json", flat(**{"proxy-url": value}))
    scan = store.scan(auths)
    assert not scan.credentials
    [problem] = scan.problems
    assert problem.skipped
    assert problem.reason == "proxy-url is no address: scheme://host:port would do"


def test_what_its_owner_says_of_an_account_is_read(auths: Path) -> None:
    said: dict[str, Any] = {"proxy_url": "socks5://u:p@h:1", "alias": " work ", "disabled": True}
    credential = store.load(write(auths / "a.json", flat(**said)))
    assert credential.proxy_url == Secret("socks5://u:p@h:1")
    assert credential.alias == "work"
    assert credential.disabled


@pytest.mark.parametrize(
    ("said", "name", "value"),
    [
        ({"priority": 3}, "priority", 3),
        ({"priority": -1}, "priority", -1),
        ({"priority": None}, "priority", 0),
        ({"weight": 2}, "weight", 2.0),
        ({"weight": 0.25}, "weight", 0.25),
        ({"max-concurrency": 4}, "max_concurrency", 4),
        ({"max_concurrency": 4}, "max_concurrency", 4),
        ({"max-concurrency": 0, "max_concurrency": 4}, "max_concurrency", 0),
        ({"max-concurrency": None}, "max_concurrency", None),
        ({"models": None}, "models_denied", ()),
        ({"models": []}, "models_denied", ()),
        ({"models": {}}, "models_denied", ()),
        ({"models": ["gpt-5*", "gpt-6.1-sol"]}, "models_allowed", ("gpt-5*", "gpt-6.1-sol")),
        ({"models": ["gpt-5*", "!*-mini"]}, "models_denied", ("*-mini",)),
        ({"models": ["!*-mini"]}, "models_allowed", ()),
        ({"models": {"allow": ["gpt-5*"], "deny": ["*-mini"]}}, "models_allowed", ("gpt-5*",)),
        ({"models": {"allow": ["gpt-5*"], "deny": ["*-mini"]}}, "models_denied", ("*-mini",)),
        ({"models": {"deny": ["*-mini"]}}, "models_allowed", ()),
        ({"models": {"allow": None, "deny": ["*-mini"]}}, "models_denied", ("*-mini",)),
    ],
)
def test_what_an_account_is_for_is_read(auths: Path, said: dict[str, Any], name: str, value: object) -> None:
    write(auths / "a.json", flat(**said))
    scan = store.scan(auths)
    assert not scan.problems
    read_value = getattr(scan.credentials[0], name)
    assert read_value == value
    assert type(read_value) is type(value)


@pytest.mark.parametrize("value", ["1", 1.5, True, [], 10**9])
def test_a_priority_that_is_none_is_left_out_and_named(auths: Path, value: Any) -> None:
    write(auths / "a.json", flat(priority=value))
    scan = store.scan(auths)
    assert scan.credentials[0].priority == 0
    assert [str(p) for p in scan.problems] == ["a.json: priority is left out: a whole number would do"]


@pytest.mark.parametrize("value", ["1", 0, -1, True, {}, 10**400])
def test_a_weight_that_is_none_is_left_out_and_named(auths: Path, value: Any) -> None:
    write(auths / "a.json", flat(weight=value))
    scan = store.scan(auths)
    assert scan.credentials[0].weight == 1.0
    assert [str(p) for p in scan.problems] == ["a.json: weight is left out: a number above 0 would do"]


@pytest.mark.parametrize("value", ["4", -1, 1.5, True, [4]])
def test_a_bound_that_cannot_be_read_is_the_narrowest(auths: Path, value: Any) -> None:
    write(auths / "a.json", flat(**{"max-concurrency": value}))
    scan = store.scan(auths)
    assert scan.credentials[0].max_concurrency == 1
    assert [str(p) for p in scan.problems] == [
        "a.json: max-concurrency is taken for 1: a whole number from 0 (any number) would do"
    ]


@pytest.mark.parametrize(
    "value",
    [
        "gpt-5*",
        7,
        ["gpt-5*", 7],
        ["gpt-5*", ""],
        ["gpt 5"],
        ["!"],
        ["x" * 300],
        {"allowed": ["gpt-5*"]},
        {"allow": "gpt-5*"},
        {"allow": ["gpt-5*"], "deny": ["!x"]},
        {"allow": ["gpt-5*"], "deny": [None]},
    ],
)
def test_models_that_cannot_be_read_in_full_serve_none(auths: Path, value: Any) -> None:
    write(auths / "a.json", flat(models=value))
    scan = store.scan(auths)
    [credential] = scan.credentials
    assert (credential.models_allowed, credential.models_denied) == ((), ("*",))
    assert [str(p) for p in scan.problems] == [
        'a.json: models cannot be read, so none is served: a list of patterns, or {"allow": [...], "deny": [...]}'
    ]


def test_two_files_with_one_alias_keep_one(auths: Path) -> None:
    write(auths / "a.json", flat("a", alias="work"))
    write(auths / "b.json", flat("b", alias="work"))
    scan = store.scan(auths)
    assert [credential.alias for credential in scan.credentials] == ["work", None]
    assert [str(problem) for problem in scan.problems] == ["b.json: alias is left out: another file has it"]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_an_alias_that_is_another_accounts_own_name_is_left_out(auths: Path, names: tuple[str, str]) -> None:
    """Else what an account is called would hang on the order of the files."""
    plain = store.load(write(auths / f"{names[0]}.json", flat("x")))
    write(auths / f"{names[1]}.json", flat("y", alias=plain.default_alias))
    scan = store.scan(auths)
    assert [credential.alias for credential in scan.credentials] == [None, None]
    assert [str(problem) for problem in scan.problems] == [
        f"{names[1]}.json: alias is left out: {plain.default_alias} is the name of another account"
    ]


def test_an_accounts_own_name_may_be_its_alias(auths: Path) -> None:
    name = store.load(write(auths / "a.json", flat("x"))).default_alias
    write(auths / "a.json", flat("x", alias=name))
    scan = store.scan(auths)
    assert ([credential.alias for credential in scan.credentials], scan.problems) == ([name], [])


def test_a_time_after_the_one_at_which_it_was_written_makes_no_file_the_newest(auths: Path) -> None:
    wrong = flat(last_refresh="2099-01-01T00:00:00Z", refresh_token="rt_old", access_token=access(ends=NOW))
    first = write(auths / "a.json", wrong)
    second = write(auths / "b.json", flat())
    os.utime(first, (NOW, NOW))
    os.utime(second, (NOW, NOW))
    assert [credential.path for credential in store.scan(auths).credentials] == [second]


def test_a_proxy_that_cannot_be_read_is_its_owners_last_word(auths: Path) -> None:
    """An account that runs must not stay on a way that its owner has just taken from it."""
    write(auths / "a.json", flat(**{"proxy-url": "not an address"}))
    [problem] = store.scan(auths).problems
    assert (problem.skipped, problem.is_final) == (True, True)
    assert "proxy-url is no address" in problem.reason


def test_an_auth_dir_that_is_a_file_is_said_to_be_no_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "auths", b"")
    assert [str(problem) for problem in store.scan(path).problems] == ["auths: auth-dir is no folder"]


def test_a_credential_shows_nothing(auths: Path) -> None:
    credential = store.load(write(auths / "user-1@example.com.json", flat()))
    assert repr(credential) == f"Credential({credential.default_alias!r})"


@pytest.mark.parametrize(
    ("one", "other", "newest"),
    [
        ({"last_refresh": "2027-01-15T08:00:00Z"}, {"last_refresh": "2027-01-15T09:00:00+02:00"}, "a.json"),
        ({"last_refresh": "2027-01-15T08:00:00Z"}, {"last_refresh": "2027-01-15T08:00:01Z"}, "b.json"),
        (
            {"last_refresh": "", "access_token": access(ends=NOW + 2)},
            {"access_token": access(ends=NOW + 1)},
            "a.json",
        ),
        ({"last_refresh": "", "access_token": "x", "expired": "", "id_token": jwt(**auth())}, {}, "b.json"),
    ],
)
def test_of_two_files_of_one_account_the_newest_serves(
    auths: Path, one: dict[str, Any], other: dict[str, Any], newest: str
) -> None:
    first = write(auths / "a.json", flat(**one))
    second = write(auths / "b.json", flat(**{"refresh_token": "rt_other", **other}))
    os.utime(first, (NOW, NOW))
    os.utime(second, (NOW, NOW + 1))
    before = first.read_bytes(), second.read_bytes()
    scan = store.scan(auths)
    assert [credential.path.name for credential in scan.credentials] == [newest]
    [problem] = scan.problems
    assert problem.name != newest
    assert newest in problem.reason
    assert (first.read_bytes(), second.read_bytes()) == before


def test_one_refresh_token_in_two_files_is_one_account(auths: Path) -> None:
    write(auths / "a.json", {"refresh_token": "rt_1"})
    write(auths / "b.json", {"refresh_token": "rt_1"})
    write(auths / "c.json", {"refresh_token": "rt_2"})
    scan = store.scan(auths)
    assert len(scan.credentials) == 2
    assert len(scan.problems) == 1


def test_a_chain_of_doubles_is_one_account(auths: Path) -> None:
    write(auths / "a.json", flat("x", refresh_token="rt_1"))
    write(auths / "b.json", flat("y", refresh_token="rt_2"))
    write(auths / "c.json", flat("x", refresh_token="rt_2"))
    scan = store.scan(auths)
    assert len(scan.credentials) == 1
    assert len(scan.problems) == 2


# -- looking again ------------------------------------------------------------------------


@pytest.fixture
def rested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file count as one that has rested."""
    monkeypatch.setattr(store, "_SETTLED_NS", -(10**18))


def found(folder: store.Folder) -> list[str] | None:
    """Look; return the names of the files in use, None when nothing changed."""
    scan = folder.look()
    return None if scan is None else [credential.path.name for credential in scan.credentials]


def test_every_kind_of_edit_is_seen_and_nothing_else(auths: Path, rested: None) -> None:
    folder = store.Folder(auths)
    assert found(folder) == []
    assert found(folder) is None
    path = write(auths / "a.json", flat())
    assert found(folder) == ["a.json"]
    assert found(folder) is None
    before = path.stat()
    write(path, flat(note=1))
    assert found(folder) == ["a.json"]
    write(path, flat(note=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the size and the time of before
    assert found(folder) == ["a.json"]
    other = write(auths.parent / "other.json", flat(note=3))
    other.rename(path)
    assert found(folder) == ["a.json"]
    path.rename(auths / "b.json")
    assert found(folder) == ["b.json"]
    (auths / "b.json").chmod(0o600)
    found(folder)
    write(auths / "notes.txt", b"")
    write(auths / ".codex-proxy-1.tmp", b"")
    assert found(folder) is None
    (auths / "b.json").unlink()
    assert found(folder) == []
    assert found(folder) is None


def test_a_symlink_is_followed_wherever_it_leads(auths: Path, tmp_path: Path, rested: None) -> None:
    one, other = write(tmp_path / "one.json", flat()), write(tmp_path / "other.json", flat("other"))
    link = auths / "a.json"
    link.symlink_to(tmp_path / "nowhere")
    folder = store.Folder(auths)
    assert found(folder) == []
    link.unlink()
    link.symlink_to(one)
    assert found(folder) == ["a.json"]
    write(one, flat(note=1))
    assert found(folder) == ["a.json"]
    # Put in its place in one step, as mounted secrets are.
    (auths / "new").symlink_to(other)
    (auths / "new").rename(link)
    scan = folder.look()
    assert scan is not None
    assert scan.credentials[0].identity.user_id == "other"
    # The same file at another place: only its folder was renamed, which leaves no mark on it.
    home = write(tmp_path / "home" / "auth.json", flat("third"))
    (auths / "new").symlink_to(home)
    (auths / "new").rename(link)
    assert found(folder) == ["a.json"]
    home.parent.rename(tmp_path / "moved")
    (auths / "new").symlink_to(tmp_path / "moved" / "auth.json")
    (auths / "new").rename(link)
    scan = folder.look()
    assert scan is not None
    assert scan.credentials[0].target == tmp_path / "moved" / "auth.json"
    assert found(folder) is None


def test_a_folder_that_goes_and_comes_is_a_change_each_time(auths: Path, rested: None) -> None:
    write(auths / "a.json", flat())
    folder = store.Folder(auths)
    assert found(folder) == ["a.json"]
    auths.rename(auths.parent / "away")
    scan = folder.look()
    assert scan is not None
    assert [str(problem) for problem in scan.problems] == [
        "auths: folder not readable: no such file or directory"
    ]
    assert folder.look() is None
    (auths.parent / "away").rename(auths)
    assert found(folder) == ["a.json"]
    assert found(folder) is None


def test_a_file_written_twice_within_a_tick_is_seen_both_times(
    auths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat(note=1))
    folder = store.Folder(auths)
    assert found(folder) == ["a.json"]
    # The times of a file are coarse: here the second write leaves all of them as they were.
    mark = store._marks(auths)
    write(path, flat(note=2))
    monkeypatch.setattr(store, "_marks", lambda _: mark)
    scan = folder.look()
    assert scan is not None
    assert scan.credentials[0].raw["note"] == 2
    assert folder.look() is None


def test_only_what_changed_is_read_again(auths: Path, monkeypatch: pytest.MonkeyPatch, rested: None) -> None:
    for name in "abc":
        write(auths / f"{name}.json", flat(name))
    write(auths / "d.json", b"{")
    folder = store.Folder(auths)
    first = folder.look()
    assert first is not None
    reads: list[str] = []
    real = files.read

    def counted(target: Path) -> tuple[bytes, os.stat_result]:
        reads.append(target.name)
        return real(target)

    monkeypatch.setattr(files, "read", counted)
    assert folder.look() is None
    write(auths / "b.json", flat("b", alias="bee"))
    second = folder.look()
    assert second is not None
    assert reads == ["b.json"]
    # What did not change is the very same, so nobody need compare it.
    assert [one is other for one, other in zip(first.credentials, second.credentials, strict=True)] == [
        True,
        False,
        True,
    ]
    assert second.credentials[1].alias == "bee"
    assert [str(problem) for problem in second.problems] == [str(problem) for problem in first.problems]
    again = folder.look(anyway=True)
    assert again is not None
    assert reads == ["b.json"]
    assert again.credentials[1] is second.credentials[1]


def test_an_alias_that_is_given_up_is_free_for_the_file_that_wanted_it(auths: Path, rested: None) -> None:
    write(auths / "a.json", flat("a", alias="work"))
    write(auths / "b.json", flat("b", alias="work"))
    folder = store.Folder(auths)

    def aliases() -> list[str | None]:
        scan = folder.look(anyway=True)
        assert scan is not None
        return [credential.alias for credential in scan.credentials]

    assert aliases() == ["work", None]
    write(auths / "a.json", flat("a", alias="home"))
    assert aliases() == ["home", "work"]


def test_thousands_of_files_are_read_at_once_and_one_change_costs_little(auths: Path, rested: None) -> None:
    for number in range(2_000):
        write(auths / f"{number}.json", flat(f"user-{number}"))
    folder = store.Folder(auths)
    started = time.perf_counter()
    scan = folder.look()
    first = time.perf_counter() - started
    assert first < 2.0
    assert scan is not None
    assert len(scan.credentials) == 2_000
    assert not scan.problems
    write(auths / "7.json", flat("user-7", priority=1))
    started = time.perf_counter()
    scan = folder.look()
    assert time.perf_counter() - started < max(0.1, first / 2)
    assert scan is not None
    assert sum(credential.priority for credential in scan.credentials) == 1


# -- writing ------------------------------------------------------------------------------


def test_new_tokens_go_into_a_flat_file(auths: Path) -> None:
    path = write(auths / "a.json", flat(rk="rt_user-1_acc-1_1", websockets=True))
    before = read(path)
    tokens = new_tokens()
    saved = store.save(store.load(path), tokens, now=NOW)
    assert tokens.access
    assert tokens.id
    assert read(path) == {
        **before,
        "access_token": tokens.access.reveal(),
        "refresh_token": "rt_2",
        "rk": "rt_2",
        "id_token": tokens.id.reveal(),
        "expired": "2027-01-15T18:00:00.000Z",
        "last_refresh": "2027-01-15T08:00:00.000Z",
    }
    assert saved.refresh == Secret("rt_2")
    assert saved.expires_at == NOW + 10 * HOUR
    assert not saved.is_unsaved
    assert store.load(path).refresh == saved.refresh


def test_new_tokens_go_into_a_codex_file(auths: Path) -> None:
    path = write(auths / "auth.json", codex(agent_identity={"x": 1}))
    before = read(path)
    tokens = new_tokens()
    store.save(store.load(path), tokens, now=NOW)
    assert tokens.access
    assert tokens.id
    assert read(path) == {
        **before,
        "tokens": {
            **before["tokens"],
            "access_token": tokens.access.reveal(),
            "refresh_token": "rt_2",
            "id_token": tokens.id.reveal(),
        },
        "last_refresh": "2027-01-15T08:00:00.000Z",
    }


def test_a_file_with_only_the_short_name_keeps_it(auths: Path) -> None:
    path = write(auths / "a.json", {"rk": "rt_1"})
    store.save(store.load(path), NewTokens(Secret("opaque"), Secret("rt_2")), now=NOW)
    assert read(path) == {"rk": "rt_2", "access_token": "opaque", "last_refresh": "2027-01-15T08:00:00.000Z"}


def test_what_the_answer_lacks_is_kept(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    before = read(path)
    saved = store.save(store.load(path), NewTokens(Secret(access(n=2))), now=NOW)
    after = read(path)
    assert after["refresh_token"] == before["refresh_token"]
    assert after["id_token"] == before["id_token"]
    assert after["access_token"] == access(n=2)
    assert saved.identity.email == "user-1@example.com"


def test_a_rotated_refresh_token_alone_is_kept(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    before = read(path)
    store.save(store.load(path), NewTokens(refresh=Secret("rt_2")), now=NOW)
    after = read(path)
    assert after["refresh_token"] == "rt_2"
    assert (after["access_token"], after["expired"]) == (before["access_token"], before["expired"])


@pytest.mark.parametrize("content", [{"refresh_token": "rt_1"}, {"tokens": {"refresh_token": "rt_1"}}])
@pytest.mark.parametrize(
    ("expires_in", "expired", "expires_at"),
    [
        (60.0, "2027-01-15T08:01:00.000Z", NOW + 60),
        (None, None, None),
        (2.53402e11, None, None),
    ],
)
def test_the_end_of_an_opaque_token_is_written_down(
    auths: Path,
    content: dict[str, Any],
    expires_in: float | None,
    expired: str | None,
    expires_at: float | None,
) -> None:
    path = write(auths / "a.json", content)
    saved = store.save(store.load(path), NewTokens(Secret("opaque"), None, None, expires_in), now=NOW)
    assert read(path).get("expired") == expired
    assert saved.expires_at == expires_at == store.load(path).expires_at


def test_an_old_end_is_not_the_new_tokens_end(auths: Path) -> None:
    path = write(
        auths / "a.json", {"refresh_token": "rt_1", "access_token": "old", "expired": "2020-01-01T00:00:00Z"}
    )
    saved = store.save(store.load(path), NewTokens(Secret("opaque")), now=NOW)
    assert saved.expires_at is None
    assert read(path)["expired"] == ""


def test_everything_unknown_survives_byte_for_byte(auths: Path) -> None:
    odd: dict[str, Any] = {
        "big": 2**70,
        "text": "héllo \u2028",
        "half": "\ud800",
        "deep": [{"x": [None, True, 1.5e-7]}],
        "": {},
    }
    path = write(auths / "a.json", flat(**odd))
    store.save(store.load(path), new_tokens(), now=NOW)
    after = read(path)
    assert {name: after[name] for name in odd} == odd


def test_an_edit_made_meanwhile_is_kept(auths: Path) -> None:
    path = write(auths / "a.json", flat(alias="old"))
    credential = store.load(path)
    edited = {**read(path), "alias": "new", "note": "by hand", "id_token": "edited"}
    write(path, edited)
    saved = store.save(credential, NewTokens(Secret(access(n=2)), Secret("rt_2")), now=NOW)
    after = read(path)
    assert (after["alias"], after["note"], after["id_token"]) == ("new", "by hand", "edited")
    assert after["refresh_token"] == "rt_2"
    assert saved.alias == "new"


def test_an_edit_between_look_and_rename_is_kept(auths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    fsync, edits = os.fsync, iter([{"note": 1}, {"note": 2}])

    def edit_then_fsync(descriptor: int) -> None:
        edit = next(edits, None)
        if edit is not None:
            write(path, {**read(path), **edit})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", edit_then_fsync)
    store.save(credential, new_tokens(), now=NOW)
    assert read(path)["note"] == 2
    assert read(path)["refresh_token"] == "rt_2"
    assert os.listdir(auths) == ["a.json"]


def test_a_file_that_never_rests_is_left_alone(auths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    fsync = os.fsync

    def edit_then_fsync(descriptor: int) -> None:
        write(path, {**read(path), "note": read(path).get("note", 0) + 1})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", edit_then_fsync)
    with pytest.raises(SaveFailed):
        store.save(credential, new_tokens(), now=NOW)
    assert read(path)["refresh_token"] == credential.refresh.reveal()
    assert os.listdir(auths) == ["a.json"]


def test_another_login_made_meanwhile_is_adopted_and_ours_is_kept_aside(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    theirs = flat(refresh_token="rt_theirs", access_token=access(n=9))
    before = write(path, theirs).read_bytes()
    adopted = store.save(credential, new_tokens(), now=NOW, data_dir=data)
    assert adopted.refresh == Secret("rt_theirs")
    assert adopted.access == Secret(access(n=9))
    assert path.read_bytes() == before
    [record] = pending(data)
    assert read(record)["refresh_token"] == "rt_2"
    # A scan does not mistake ours for newer than theirs.
    assert store.scan(auths, data).credentials[0].refresh == Secret("rt_theirs")
    assert path.read_bytes() == before


def pending(data: Path) -> list[Path]:
    folder = data / "pending"
    return sorted(folder.iterdir()) if folder.exists() else []


def test_a_symlink_is_written_through(auths: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "home" / "auth.json", codex())
    (auths / "a.json").symlink_to(target)
    saved = store.save(store.scan(auths).credentials[0], new_tokens(), now=NOW)
    assert (auths / "a.json").is_symlink()
    assert not target.is_symlink()
    assert read(target)["tokens"]["refresh_token"] == "rt_2"
    assert saved.path == auths / "a.json"
    assert saved.target == target
    assert os.listdir(target.parent) == ["auth.json"]


def test_the_file_is_its_owners_alone(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    path.chmod(0o644)
    previous = os.umask(0)
    try:
        store.save(store.load(path), new_tokens(), now=NOW)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_bytes_are_on_disk_before_the_name_is(auths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    steps: list[str] = []
    os_write, fsync, replace = os.write, os.fsync, os.replace

    def write_a_little(descriptor: int, data: bytes) -> int:
        steps.append("write")
        return os_write(descriptor, data[:100])

    def note_fsync(descriptor: int) -> None:
        steps.append("fsync " + ("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"))
        fsync(descriptor)

    def note_replace(one: Path, other: Path) -> None:
        steps.append("rename")
        replace(one, other)

    monkeypatch.setattr(os, "write", write_a_little)
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    store.save(credential, new_tokens(), now=NOW)
    assert steps.count("write") > 5
    assert [step for step in steps if step != "write"] == ["fsync file", "rename", "fsync folder"]
    assert read(path)["refresh_token"] == "rt_2"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_users_file_stays_the_users(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    os.chown(path, 1234, 1235)
    store.save(store.load(path), new_tokens(), now=NOW)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("replace", errno.EROFS, "read-only file system"),
        ("replace", errno.EBUSY, "busy"),
        ("write", errno.ENOSPC, "no space left on device"),
        ("fsync", errno.EIO, "input/output error"),
        ("fchmod", errno.EPERM, "operation not permitted"),
    ],
)
def test_a_save_that_fails_harms_nothing_and_keeps_the_tokens(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int, words: str
) -> None:
    path = write(auths / "jane@example.com.json", flat())
    before = path.read_bytes()
    credential = store.load(path)
    fails = failing_beside(auths, getattr(os, function), code)
    with monkeypatch.context() as patched:
        patched.setattr(os, function, fails)
        with pytest.raises(SaveFailed) as caught:
            store.save(credential, new_tokens(), now=NOW, data_dir=data)
    failed = caught.value
    assert words in failed.message
    assert "jane" not in failed.message
    assert path.read_bytes() == before
    assert os.listdir(auths) == [path.name]
    assert failed.is_pending
    assert failed.credential.refresh == Secret("rt_2")
    assert failed.credential.is_unsaved
    assert [stat.S_IMODE(record.stat().st_mode) for record in pending(data)] == [0o600]
    assert stat.S_IMODE((data / "pending").stat().st_mode) == 0o700

    retried = store.save(failed.credential, NewTokens(), now=NOW + 5, data_dir=data)
    assert not retried.is_unsaved
    assert read(path)["refresh_token"] == "rt_2"
    assert read(path)["last_refresh"] == "2027-01-15T08:00:00.000Z"
    assert pending(data) == []


def failing_beside(folder: Path, function: Callable[..., Any], code: int) -> Callable[..., Any]:
    """Let *function* fail for files in *folder* only."""

    def fail(subject: Any, *args: Any, **kwargs: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else os.fspath(subject)
        if Path(path).parent == folder:
            raise OSError(code, os.strerror(code), path)
        return function(subject, *args, **kwargs)

    return fail


def test_a_file_that_is_half_written_is_not_overwritten(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    half = path.read_bytes()[:100]
    write(path, half)
    with pytest.raises(SaveFailed) as caught:
        store.save(credential, new_tokens(), now=NOW, data_dir=data)
    assert path.read_bytes() == half
    assert caught.value.is_pending
    assert caught.value.credential.refresh == Secret("rt_2")


def test_a_file_that_was_taken_away_does_not_come_back(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(Vanished) as caught:
        store.save(credential, new_tokens(), now=NOW, data_dir=data)
    assert os.listdir(auths) == []
    assert caught.value.credential.refresh == Secret("rt_2")
    # Put back later with its spent token, it finds its new one.
    write(path, content)
    assert store.scan(auths, data).credentials[0].refresh == Secret("rt_2")
    assert read(path)["refresh_token"] == "rt_2"


def test_a_file_that_goes_while_we_write_does_not_come_back(
    auths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    fsync = os.fsync

    def unlink_then_fsync(descriptor: int) -> None:
        path.unlink(missing_ok=True)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", unlink_then_fsync)
    with pytest.raises(Vanished):
        store.save(credential, new_tokens(), now=NOW)
    assert os.listdir(auths) == []


# -- what waits in data-dir ----------------------------------------------------------------


def unsaved(
    credential: Credential, tokens: NewTokens, data: Path, monkeypatch: pytest.MonkeyPatch, now: float = NOW
) -> Credential:
    """Save while the folder of the credential is read-only."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing_beside(credential.target.parent, os.replace, errno.EROFS))
        with pytest.raises(SaveFailed) as caught:
            store.save(credential, tokens, now=now, data_dir=data)
    return caught.value.credential


def test_a_waiting_save_is_completed_by_the_next_scan(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat(note=1))
    unsaved(store.load(path), new_tokens(), data, monkeypatch)
    scan = store.scan(auths, data)
    assert not scan.problems
    assert scan.credentials[0].refresh == Secret("rt_2")
    assert not scan.credentials[0].is_unsaved
    after = read(path)
    assert (after["refresh_token"], after["note"], after["last_refresh"]) == (
        "rt_2",
        1,
        "2027-01-15T08:00:00.000Z",
    )
    assert pending(data) == []


def test_a_folder_that_stays_read_only_still_serves_the_newest_tokens(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    before = path.read_bytes()
    credential = unsaved(store.load(path), new_tokens(2), data, monkeypatch)
    credential = unsaved(credential, new_tokens(3), data, monkeypatch, now=NOW + HOUR)
    assert len(pending(data)) == 1
    for _ in range(2):  # a restart, and one more
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", failing_beside(auths, os.replace, errno.EROFS))
            scan = store.scan(auths, data)
        [credential] = scan.credentials
        assert credential.refresh == Secret("rt_3")
        assert credential.is_unsaved
        assert [problem.skipped for problem in scan.problems] == [False]
        assert "kept in data-dir" in scan.problems[0].reason
    credential = unsaved(credential, new_tokens(4), data, monkeypatch, now=NOW + 2 * HOUR)
    assert path.read_bytes() == before
    saved = store.save(credential, NewTokens(), now=NOW + 3 * HOUR, data_dir=data)
    assert saved.refresh == Secret("rt_4")
    assert read(path)["refresh_token"] == "rt_4"
    assert read(path)["last_refresh"] == "2027-01-15T10:00:00.000Z"
    assert pending(data) == []


def test_a_retry_keeps_the_end_of_an_opaque_token(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", {"refresh_token": "rt_1", "expired": "2020-01-01T00:00:00Z"})
    tokens = NewTokens(Secret("opaque"), Secret("rt_2"), None, HOUR)
    credential = unsaved(store.load(path), tokens, data, monkeypatch)
    assert credential.expires_at == NOW + HOUR
    for again in (NewTokens(), credential.all_tokens()):
        write(path, {"refresh_token": "rt_1"})
        saved = store.save(credential, again, now=NOW + 60)
        assert (saved.expires_at, saved.last_refresh) == (NOW + HOUR, NOW)
    write(path, {"refresh_token": "rt_1"})
    assert store.scan(auths, data).credentials[0].expires_at == NOW + HOUR


def test_an_access_token_alone_waits_in_memory(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    credential = unsaved(store.load(path), NewTokens(Secret(access(n=5))), data, monkeypatch)
    assert credential.is_unsaved
    assert pending(data) == []
    store.save(credential, NewTokens(), now=NOW)
    assert read(path)["access_token"] == access(n=5)


def test_a_broken_record_harms_nobody(auths: Path, data: Path) -> None:
    write(auths / "a.json", flat())
    for number, content in enumerate([
        b"{",
        b"{}",
        b"[]",
        b'{"replaces": 7, "refresh_token": "rt_2"}',
        b'{"at": 1}',
    ]):
        write(data / "pending" / f"{number}.tokens.json", content)
        write(data / "pending" / f"{number}.exchange.json", content)
    scan = store.scan(auths, data)
    assert len(scan.credentials) == 1
    assert not scan.problems
    assert len(pending(data)) == 10


def test_data_dir_that_cannot_be_written_is_told(
    auths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    blocked = write(tmp_path / "data", b"a file, not a folder")
    assert not store.note_exchange(blocked, credential, now=NOW)
    store.clear_exchange(blocked, credential)
    path.unlink()
    with pytest.raises(Vanished) as caught:
        store.save(credential, new_tokens(), now=NOW, data_dir=blocked)
    assert not caught.value.is_pending
    assert caught.value.credential.refresh == Secret("rt_2")


def test_an_exchange_without_an_end_is_remembered(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    write(auths / "b.json", flat("other"))
    credential = store.load(path)
    assert store.note_exchange(data, credential, now=NOW)
    assert credential.refresh.reveal() not in pending(data)[0].read_text(encoding="utf-8")
    assert [found.interrupted for found in store.scan(auths, data).credentials] == [NOW, None]
    store.clear_exchange(data, credential)
    store.clear_exchange(data, credential)
    assert [found.interrupted for found in store.scan(auths, data).credentials] == [None, None]


def test_a_new_login_after_a_lost_answer_starts_afresh(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    store.note_exchange(data, store.load(path), now=NOW)
    write(path, flat(refresh_token="rt_fresh"))
    assert store.scan(auths, data).credentials[0].interrupted is None


def test_an_exchange_that_ends_during_the_look_is_not_an_interrupted_one(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    store.note_exchange(data, credential, now=NOW)
    records = Pending.load(data)
    store.clear_exchange(data, credential)
    monkeypatch.setattr(Pending, "load", lambda _: records)
    assert store.scan(auths, data).credentials[0].interrupted is None


def test_two_processes_do_not_exchange_one_token(auths: Path) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    other = store.load(write(auths / "b.json", flat("other")))
    with store.exchange_lock(credential) as first:
        assert first
        with store.exchange_lock(credential) as second, store.exchange_lock(other) as third:
            assert not second
            assert third
    with store.exchange_lock(credential) as again:
        assert again
    assert not store.scan(auths).problems


def test_a_folder_without_room_for_a_lock_keeps_nobody_out(auths: Path) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    write(auths / ".codex-proxy-locks", b"")
    with store.exchange_lock(credential) as held:
        assert held


def test_a_waiting_save_is_left_to_the_process_that_has_the_lock(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    before = path.read_bytes()
    credential = store.load(path)
    unsaved(credential, new_tokens(), data, monkeypatch)
    with store.exchange_lock(credential):
        [waiting] = store.scan(auths, data).credentials
    assert waiting.refresh == Secret("rt_2")
    assert waiting.is_unsaved
    assert path.read_bytes() == before
    assert len(pending(data)) == 1


def test_new_tokens_are_in_data_dir_before_their_file_is_touched_and_not_after(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    steps: list[str] = []
    real = files.write_atomic

    def write_atomic(target: Path, *args: Any, **kwargs: Any) -> bool:
        steps.append(target.parent.name)
        return real(target, *args, **kwargs)

    monkeypatch.setattr(files, "write_atomic", write_atomic)
    store.save(credential, new_tokens(), now=NOW, data_dir=data)
    assert steps == ["pending", "auths"]
    assert pending(data) == []


def test_a_record_whose_file_was_written_is_tidied_away(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    # Killed between the file's rename and the end of the record.
    monkeypatch.setattr(Pending, "forget", lambda *_, **__: None)
    store.save(store.load(path), new_tokens(), now=NOW, data_dir=data)
    monkeypatch.undo()
    assert len(pending(data)) == 1
    assert store.scan(auths, data).credentials[0].refresh == Secret("rt_2")
    assert pending(data) == []


def test_a_record_is_written_once_however_often_the_save_is_tried(
    auths: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat())
    credential = unsaved(store.load(path), new_tokens(), data, monkeypatch)
    [record] = pending(data)
    before = record.stat()
    unsaved(credential, NewTokens(), data, monkeypatch, now=NOW + 60)
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_tokens_kept_aside_for_another_login_outlive_that_logins_exchange(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    write(path, flat(refresh_token="rt_theirs"))
    theirs = store.save(credential, new_tokens(), now=NOW, data_dir=data)
    store.save(theirs, new_tokens(3), now=NOW + HOUR, data_dir=data)
    assert [read(record)["refresh_token"] for record in pending(data)] == ["rt_2"]


def test_a_refused_token_stays_refused_at_the_next_start(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    store.note_exchange(data, credential, now=NOW)
    [credential] = store.scan(auths, data).credentials
    assert (credential.interrupted, credential.refused) == (NOW, "")
    store.note_refusal(data, credential, "refresh_token_reused", now=NOW + HOUR)
    [credential] = store.scan(auths, data).credentials
    assert (credential.interrupted, credential.refused) == (NOW, "refresh_token_reused")
    write(path, flat(refresh_token="rt_fresh"))
    [credential] = store.scan(auths, data).credentials
    assert (credential.interrupted, credential.refused) == (None, "")


def test_an_exchange_that_is_under_way_is_not_an_interrupted_one(auths: Path, data: Path) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    store.note_exchange(data, credential, now=NOW)
    with store.exchange_lock(credential):
        assert store.scan(auths, data).credentials[0].interrupted is None
    assert store.scan(auths, data).credentials[0].interrupted == NOW


# -- kill -9 ------------------------------------------------------------------------------

KILLER = """
    import os, sys
    from pathlib import Path
    from codex_proxy.accounts import files, store
    from codex_proxy.accounts.tokens import NewTokens, Secret

    path, data, access = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    content = path.read_bytes()
    credential = store.load(path)
    CALLS = ["open", "close", "read", "write", "fstat", "stat", "fchmod", "fchown", "fsync", "replace", "unlink", "mkdir"]

    def run(last):
        count = 0
        def counted(name, function):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count == last:
                    if name == "write":
                        function(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os._exit(9)
                return function(*args, **kwargs)
            return call
        for name in CALLS:
            setattr(os, name, counted(name, getattr(os, name)))
        store.save(credential, NewTokens(Secret(access), Secret("rt_2")), now=1_800_000_000.0, data_dir=data)
        os._exit(0)

    phases = {"before": 0, "after": 0}
    for last in range(1, 200):
        path.write_bytes(content)
        child = os.fork()
        if child == 0:
            run(last)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9), code
        found = store.scan(path.parent, data)
        assert not found.problems, found.problems
        [survivor] = found.credentials
        assert survivor.raw["note"] == {"kept": 2**70}
        assert survivor.id == credential.id
        pair = (survivor.refresh.reveal(), survivor.access.reveal())
        old, new = (credential.refresh.reveal(), credential.access.reveal()), ("rt_2", access)
        assert pair in (old, new), "torn"
        phases["after" if pair == new else "before"] += 1
        if code == 0:
            assert pair == new
            break
    print(phases["before"], phases["after"])
"""


def test_a_kill_at_any_moment_of_a_save_leaves_one_whole_login(auths: Path, data: Path) -> None:
    path = write(auths / "a.json", flat(note={"kept": 2**70}))
    arguments = [str(path), str(data), access(n=2)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(store.__file__).parents[2],
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    # Until the record of the new tokens has its name: the old login. From then on the new one,
    # long before its file is written.
    assert before >= 8
    assert after >= 20


def test_a_leftover_of_a_crash_is_not_read(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    write(auths / ".codex-proxy-0123.tmp", flat("other"))
    store.save(store.load(path), new_tokens(), now=NOW)
    assert len(store.scan(auths).credentials) == 1


def test_a_usable_file_is_asked_for_by_name(auths: Path) -> None:
    with pytest.raises(Unusable, match="not there any more"):
        store.load(auths / "a.json")


def test_one_file_under_two_names_is_named_as_that(auths: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "auth.json", flat())
    for name in ("a.json", "b.json"):
        (auths / name).symlink_to(tmp_path / "elsewhere" / "auth.json")
    scan = store.scan(auths)
    assert len(scan.credentials) == 1
    assert [str(problem) for problem in scan.problems] == [
        "b.json: the same file as a.json; this one is left alone"
    ]
