"""Accounts that come, change and go by command: one file each, and nothing of it lost."""

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import files, store
from codex_proxy.accounts.store import SaveFailed, Unusable, Vanished
from codex_proxy.accounts.tokens import Secret
from tests.accounts.logins import HOUR, NOW, access, auth, codex, flat, jwt, new_tokens, read, write


@pytest.fixture
def auths(tmp_path: Path) -> Path:
    folder = tmp_path / "auths"
    folder.mkdir()
    return folder


# -- edit ---------------------------------------------------------------------------------


def off(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "disabled": True}


def test_an_edit_changes_one_thing_and_keeps_all_else(auths: Path) -> None:
    path = write(auths / "a.json", flat(note={"kept": [2**70]}))
    path.chmod(0o640)
    before = read(path)
    edited = store.edit(path, off)
    assert edited.disabled
    assert read(path) == {**before, "disabled": True}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert edited.mtime_ns == path.stat().st_mtime_ns
    assert os.listdir(auths) == ["a.json"]


def test_an_edit_that_changes_nothing_writes_nothing(auths: Path) -> None:
    path = write(auths / "a.json", flat(disabled=True))
    before = path.stat()
    assert store.edit(path, off).disabled
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_edited_file_stays_its_owners(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    os.chown(path, 1234, 1235)
    store.edit(path, off)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)


def test_tokens_that_come_during_an_edit_are_kept(auths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(auths / "a.json", flat())
    credential = store.load(path)
    calls: list[str] = []

    def change(raw: dict[str, Any]) -> dict[str, Any]:
        calls.append(raw["refresh_token"])
        if len(calls) == 1:
            store.save(credential, new_tokens(), now=NOW)
        raw["disabled"] = True
        return raw

    edited = store.edit(path, change)
    assert calls == ["rt_user-1_acc-1_1", "rt_2"]
    assert edited.refresh == Secret("rt_2")
    assert read(path)["refresh_token"] == "rt_2"
    assert read(path)["disabled"] is True


def test_an_edit_goes_through_a_symlink(auths: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "home" / "auth.json", codex())
    (auths / "a.json").symlink_to(target)
    store.edit(auths / "a.json", off)
    assert (auths / "a.json").is_symlink()
    assert read(target)["disabled"] is True


def test_an_edit_never_leaves_a_file_without_its_login(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    before = path.read_bytes()
    with pytest.raises(Unusable, match="neither an access token nor a refresh token"):
        store.edit(path, lambda _: {"alias": "x"})
    with pytest.raises(Unusable, match="proxy-url is no address"):
        store.edit(path, lambda raw: {**raw, "proxy-url": "x"})
    assert path.read_bytes() == before


def test_a_file_that_is_no_login_cannot_be_edited(auths: Path) -> None:
    with pytest.raises(Unusable, match="not there any more"):
        store.edit(auths / "a.json", off)
    write(auths / "a.json", b"{")
    with pytest.raises(Unusable, match="not JSON"):
        store.edit(auths / "a.json", off)
    assert (auths / "a.json").read_bytes() == b"{"


def test_an_edit_that_cannot_be_written_says_why(auths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(auths / "jane@example.com.json", flat())
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "x", str(path))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SaveFailed, match="was not written: read-only file system") as caught:
        store.edit(path, off)
    assert "jane" not in str(caught.value)
    assert path.read_bytes() == before
    monkeypatch.undo()
    monkeypatch.setattr(files, "write_atomic", lambda *_, **__: False)
    with pytest.raises(SaveFailed, match="changed all the time"):
        store.edit(path, off)


# -- add ----------------------------------------------------------------------------------


def test_a_login_gets_a_file_of_its_own_that_gives_no_address_away(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    login = flat(note=1)
    added = store.add(folder, login)
    assert added.outcome == "added"
    path = added.credential.path
    assert path.parent == folder
    assert path.name == f"{added.credential.default_alias}.json"
    assert read(path) == login
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert store.scan(folder).credentials[0].key == added.credential.key


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("work", "work.json"),
        ("work.json", "work.json"),
        ("Work.JSON", "Work.json"),
        ("jane@example.com", "jane@example.com.json"),
        ("../../etc/passwd", "etc-passwd.json"),
        (".hidden", "hidden.json"),
        ("a b\n/c", "a-b-c.json"),
        ("x" * 300, "x" * 100 + ".json"),
    ],
)
def test_a_name_is_made_safe(auths: Path, name: str, expected: str) -> None:
    assert store.add(auths, flat(), name=name).credential.path == auths / expected


@pytest.mark.parametrize("name", ["", "///", "..", ".json"])
def test_a_name_of_which_nothing_is_left_is_none(auths: Path, name: str) -> None:
    added = store.add(auths, flat(), name=name)
    assert added.credential.path.name == f"{added.credential.default_alias}.json"


def test_a_name_that_is_taken_is_left_to_whoever_has_it(auths: Path) -> None:
    write(auths / "work.json", b"half wri")
    names = [store.add(auths, flat(user), name="work").credential.path.name for user in ("a", "b")]
    assert names == ["work-2.json", "work-3.json"]
    assert (auths / "work.json").read_bytes() == b"half wri"


def test_an_account_that_is_there_gets_newer_tokens_into_its_own_file(auths: Path) -> None:
    path = write(auths / "mine.json", flat(alias="work", disabled=True, note={"kept": 1}))
    before = read(path)
    login = flat(
        refresh_token="rt_new",
        access_token=access(ends=NOW + 9 * HOUR, n=9),
        last_refresh="2027-01-15T08:00:01Z",
        alias="other",
    )
    added = store.add(auths, login, name="new", now=NOW)
    assert added.outcome == "updated"
    assert added.credential.path == path
    assert os.listdir(auths).count("new.json") == 0
    after = read(path)
    assert (after["refresh_token"], after["access_token"]) == ("rt_new", login["access_token"])
    assert after["last_refresh"] == "2027-01-15T08:00:01.000Z"
    assert (after["alias"], after["disabled"], after["note"]) == ("work", True, {"kept": 1})
    assert after.keys() == before.keys()


def in_shape(shape: str, at: str) -> dict[str, Any]:
    """Return a login of one and the same account, made at a time."""
    if shape == "codex":
        return codex(last_refresh=at)
    return flat(id_token=jwt(email="jane@example.com", **auth()), last_refresh=at)


@pytest.mark.parametrize("held", ["flat", "codex"])
@pytest.mark.parametrize("brought", ["flat", "codex"])
def test_a_file_keeps_its_own_shape(auths: Path, held: str, brought: str) -> None:
    path = write(auths / "a.json", in_shape(held, "2027-01-15T08:00:00Z"))
    before = read(path)
    login = in_shape(brought, "2027-01-15T09:00:00Z")
    login.get("tokens", login).update(refresh_token="rt_new", login_owner_id="new-owner")
    assert store.add(auths, login, now=NOW).outcome == "updated"
    after = read(path)
    assert after.keys() - before.keys() <= {"expired"}
    assert after.get("tokens", after)["refresh_token"] == "rt_new"
    if held == brought == "codex":
        # What the Codex CLI notes beside its tokens is of their login.
        assert after["tokens"]["login_owner_id"] == "new-owner"
    elif held == "codex":
        assert after["tokens"]["login_owner_id"] == before["tokens"]["login_owner_id"]
    assert len(store.scan(auths).credentials) == 1


@pytest.mark.parametrize(
    "login",
    [
        flat(),
        flat(refresh_token="rt_old", last_refresh="2027-01-14T08:00:00Z"),
        flat(refresh_token="rt_odd", last_refresh="", access_token=access(ends=NOW + HOUR - 5)),
        flat(refresh_token="rt_odd", last_refresh="", access_token="", expired=""),
    ],
)
def test_tokens_that_are_not_newer_change_nothing(auths: Path, login: dict[str, Any]) -> None:
    path = write(auths / "a.json", flat())
    before = path.read_bytes()
    added = store.add(auths, login, now=NOW)
    assert added.outcome == "kept"
    assert added.credential.path == path
    assert path.read_bytes() == before
    assert [name for name in os.listdir(auths) if name.endswith(".json")] == ["a.json"]


def test_a_login_that_knows_its_time_is_newer_than_one_that_does_not(auths: Path) -> None:
    path = write(auths / "a.json", {"refresh_token": "rt_1", "id_token": flat()["id_token"]})
    assert store.add(auths, flat()).outcome == "updated"
    assert read(path)["refresh_token"] == "rt_user-1_acc-1_1"


def test_new_tokens_in_a_file_that_others_could_read_are_its_owners_alone(auths: Path) -> None:
    path = write(auths / "a.json", flat())
    path.chmod(0o644)
    login = flat(refresh_token="rt_new", last_refresh="2027-01-15T08:00:01Z")
    assert store.add(auths, login, now=NOW).outcome == "updated"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("at", "outcome"),
    [("2099-01-01T00:00:00Z", "kept"), ("2027-01-16T07:59:00Z", "updated"), ("2027-01-16T08:01:00Z", "kept")],
)
def test_a_time_that_has_not_come_makes_no_login_newer(auths: Path, at: str, outcome: str) -> None:
    path = write(auths / "a.json", flat())
    assert store.add(auths, flat(refresh_token="rt_old", last_refresh=at), now=NOW).outcome == outcome
    assert (read(path)["refresh_token"] == "rt_old") is (outcome == "updated")


def test_a_file_whose_own_time_has_not_come_can_be_outdone(auths: Path) -> None:
    path = write(auths / "a.json", flat(last_refresh="2099-01-01T00:00:00Z"))
    login = flat(refresh_token="rt_new", access_token=access(ends=NOW + 9 * HOUR))
    assert store.add(auths, login, now=NOW).outcome == "updated"
    assert read(path)["refresh_token"] == "rt_new"


def test_a_login_that_names_nobody_is_called_as_its_file(auths: Path) -> None:
    added = store.add(auths, {"refresh_token": "rt_1"})
    assert added.credential.alias == added.credential.path.stem
    assert read(added.credential.path) == {"refresh_token": "rt_1", "alias": added.credential.path.stem}


def test_another_workspace_is_another_account(auths: Path) -> None:
    outcomes = [store.add(auths, flat("jane", workspace)).outcome for workspace in ("home", "work", "home")]
    assert outcomes == ["added", "added", "kept"]


def test_one_that_names_no_account_is_known_by_its_token(auths: Path) -> None:
    outcomes = [store.add(auths, {"refresh_token": token}).outcome for token in ("rt_1", "rt_2", "rt_1")]
    assert outcomes == ["added", "added", "kept"]
    assert store.add(auths, {"access_token": "opaque"}).outcome == "added"
    assert store.add(auths, {"access_token": "opaque"}).outcome == "kept"
    assert len(store.scan(auths).credentials) == 3


def test_what_holds_no_login_is_not_added(auths: Path) -> None:
    with pytest.raises(Unusable, match="API key"):
        store.add(auths, {"OPENAI_API_KEY": "sk-1"})
    assert os.listdir(auths) == []


def test_a_folder_that_cannot_be_made_or_written_is_said(auths: Path, tmp_path: Path) -> None:
    write(tmp_path / "file", b"")
    with pytest.raises(SaveFailed, match="folder cannot be made"):
        store.add(tmp_path / "file" / "auths", flat())
    write(tmp_path / "taken", b"")
    with pytest.raises(SaveFailed):
        store.add(tmp_path / "taken", flat())


ADDER = """
    import json, sys
    from pathlib import Path
    from codex_proxy.accounts import store

    logins = json.loads(sys.argv[2])
    sys.stdin.readline()
    print(json.dumps([store.add(Path(sys.argv[1]), login).outcome for login in logins]))
"""


def test_processes_that_add_at_the_same_time_make_one_file_per_account(auths: Path) -> None:
    logins = [flat(f"user-{number}") for number in range(10)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(ADDER), str(auths), json.dumps(logins)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(store.__file__).parents[2],
        )
        for _ in range(4)
    ]
    answers = [json.loads(process.communicate("go\n", timeout=30)[0]) for process in processes]
    for outcomes in zip(*answers, strict=True):
        assert sorted(outcomes) == ["added", "kept", "kept", "kept"]
    scan = store.scan(auths)
    assert len(scan.credentials) == 10
    assert not scan.problems


def test_a_file_that_holds_another_account_by_now_keeps_that(
    auths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(auths / "a.json", flat("mine"))
    real = store.edit

    def edit(*args: Any, **more: Any) -> store.Credential:
        write(path, flat("other"))
        return real(*args, **more)

    monkeypatch.setattr(store, "edit", edit)
    with pytest.raises(Unusable, match="another account by now"):
        store.add(auths, flat("mine", refresh_token="rt_new", last_refresh="2027-01-15T09:00:00Z"), now=NOW)
    assert read(path) == flat("other")


# -- take out -----------------------------------------------------------------------------


def test_a_file_that_is_taken_out_is_kept_elsewhere(auths: Path, tmp_path: Path) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    content = credential.path.read_bytes()
    path = store.take_out(credential, tmp_path / "data" / "removed")
    assert path == tmp_path / "data" / "removed" / "a.json"
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not store.scan(auths).credentials
    # Nor does a save that was under way bring it back.
    with pytest.raises(Vanished):
        store.save(credential, new_tokens(), now=NOW)
    assert os.listdir(auths) == []


def test_a_file_that_is_gone_already_is_said_to_be(auths: Path, tmp_path: Path) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    credential.path.unlink()
    with pytest.raises(Vanished):
        store.take_out(credential, tmp_path / "removed")


def test_a_file_that_cannot_be_moved_stays(auths: Path, tmp_path: Path) -> None:
    credential = store.load(write(auths / "jane@example.com.json", flat()))
    write(tmp_path / "removed", b"")
    with pytest.raises(SaveFailed, match=r"below data-dir.*cannot be made: file exists") as caught:
        store.take_out(credential, tmp_path / "removed")
    assert "jane" not in str(caught.value)
    assert credential.path.exists()


def test_a_folder_of_removed_files_that_cannot_be_made_is_not_a_file_that_is_gone(
    auths: Path, tmp_path: Path
) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    nowhere = tmp_path / "loop"
    nowhere.symlink_to(tmp_path / "not" / "there")
    with pytest.raises(SaveFailed, match=r"below data-dir.*cannot be made"):
        store.take_out(credential, nowhere / "removed")
    with pytest.raises(SaveFailed, match=r"below data-dir.*cannot be made"):
        store.check_take_out(credential, nowhere / "removed")
    assert credential.path.exists()


def test_a_move_can_be_tried_without_moving(
    auths: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credential = store.load(write(auths / "a.json", flat()))
    removed = tmp_path / "data" / "removed"
    store.check_take_out(credential, removed)
    assert (os.listdir(removed), os.listdir(auths)) == ([], ["a.json"])
    real = files.probe

    def probe(folder: Path) -> None:
        if folder == auths:
            raise OSError(errno.EROFS, "")
        real(folder)

    monkeypatch.setattr(files, "probe", probe)
    with pytest.raises(SaveFailed, match="auth-dir cannot be written to: read-only file system"):
        store.check_take_out(credential, removed)
    monkeypatch.undo()
    credential.path.unlink()
    with pytest.raises(Vanished):
        store.check_take_out(credential, removed)
