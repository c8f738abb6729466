"""Files that hold secrets: whole at every moment, at one place at least, and left by nobody."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from codex_proxy.accounts import files


def failing(function: Callable[..., Any], code: int, times: int = 10**9) -> Callable[..., Any]:
    left = times

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            raise OSError(code, os.strerror(code), "/home/jane@example.com")
        return function(*args, **kwargs)

    return fail


# -- new files ----------------------------------------------------------------------------


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_takes_no_other_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))
    paths = [files.write_new(tmp_path, "a", str(number).encode()) for number in range(3)]
    (tmp_path / "b.json").symlink_to(tmp_path / "nowhere")
    assert files.write_new(tmp_path, "b", b"b").name == "b-2.json"
    assert [path.name for path in paths] == ["a.json", "a-2.json", "a-3.json"]
    assert [path.read_bytes() for path in paths] == [b"0", b"1", b"2"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o600}
    assert {path.stat().st_nlink for path in paths} == {1}
    assert sorted(os.listdir(tmp_path)) == ["a-2.json", "a-3.json", "a.json", "b-2.json", "b.json"]


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
def test_a_new_file_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(os, "link", failing(os.link, errno.EPERM))
    monkeypatch.setattr(os, function, failing(getattr(os, function), errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        files.write_new(tmp_path, "a", b"a")
    assert os.listdir(tmp_path) == []


# -- moving -------------------------------------------------------------------------------


@pytest.fixture(params=["same file system", "another file system"])
def is_far(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the two folders are on different file systems; a rename between them fails then."""
    if request.param == "same file system":
        return False
    real = os.rename

    def rename(one: Path, other: Path) -> None:
        if Path(one).parent != Path(other).parent:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    return True


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    return tmp_path / "here" / "a.json", tmp_path / "there"


def test_a_file_is_moved_under_a_name_that_is_free(places: tuple[Path, Path], is_far: bool) -> None:
    path, there = places
    (there / "a.json").write_bytes(b"another")
    path.write_bytes(b"mine")
    path.chmod(0o640)
    target = files.move(path, there)
    assert target == there / "a-2.json"
    assert target.read_bytes() == b"mine"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert not path.exists()
    assert (there / "a.json").read_bytes() == b"another"
    assert sorted(os.listdir(there)) == ["a-2.json", "a.json"]


def test_a_file_is_somewhere_at_every_moment(
    places: tuple[Path, Path], is_far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, there = places
    path.write_bytes(b"mine")
    seen: list[bool] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            finally:
                copies = [path, *there.glob("*.json")]
                seen.append(any(copy.exists() and copy.stat().st_size == 4 for copy in copies))

        return call

    for name in ("open", "close", "write", "fsync", "replace", "rename", "unlink", "fchmod"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    files.move(path, there)
    assert len(seen) > 3
    assert all(seen)


def test_what_is_written_while_it_is_copied_is_what_arrives(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, there = places
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "rename", failing(os.rename, errno.EXDEV))
    news = iter([b"newer", b"newest"])
    fsync = os.fsync

    def write_then_fsync(descriptor: int) -> None:
        new = next(news, None)
        if new is not None:
            path.write_bytes(new)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", write_then_fsync)
    assert files.move(path, there).read_bytes() == b"newest"
    assert not path.exists()


@pytest.mark.parametrize("function", ["rename", "write"])
def test_a_move_that_fails_leaves_the_file_where_it_was(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path, there = places
    path.write_bytes(b"mine")
    monkeypatch.setattr(os, "rename", failing(os.rename, errno.EXDEV))
    monkeypatch.setattr(os, function, failing(getattr(os, function), errno.EROFS))
    with pytest.raises(OSError, match="Read-only"):
        files.move(path, there)
    assert path.read_bytes() == b"mine"
    assert os.listdir(there) == []


def test_a_file_that_cannot_be_given_away_is_not_in_two_places(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, there = places
    path.write_bytes(b"mine")
    monkeypatch.setattr(os, "rename", failing(os.rename, errno.EXDEV))
    unlink = os.unlink

    def kept(target: Path) -> None:
        if target == path:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        unlink(target)

    monkeypatch.setattr(os, "unlink", kept)
    with pytest.raises(OSError, match="Read-only"):
        files.move(path, there)
    assert path.read_bytes() == b"mine"
    assert os.listdir(there) == []


def test_a_symlink_is_moved_and_what_it_leads_to_stays(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = places
    own = path.parent / "home" / "auth.json"
    own.parent.mkdir()
    own.write_bytes(b"mine")
    monkeypatch.chdir(path.parent.parent)
    path.symlink_to("home/auth.json")
    target = files.move(Path("here/a.json"), Path("there"))
    assert target.is_symlink()
    assert target.read_bytes() == b"mine"
    assert not path.is_symlink()
    assert own.exists()


def test_a_file_that_is_gone_cannot_be_moved(places: tuple[Path, Path], is_far: bool) -> None:
    path, there = places
    with pytest.raises(FileNotFoundError):
        files.move(path, there)
    assert os.listdir(there) == []


# -- leftovers ----------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_when_it_is_old_and_nobodys(tmp_path: Path) -> None:
    now = time.time()
    old, young, held = (tmp_path / f".codex-proxy-{digit * 16}.tmp" for digit in "123")
    others = [tmp_path / name for name in (".codex-proxy-key.tmp", "a.json", ".x.tmp", ".codex-proxy-locks")]
    for path in (old, young, held, *others):
        path.write_bytes(b"secret")
        os.utime(path, (now - 3_700, now - 3_700))
    os.utime(young, (now - 3_500, now - 3_500))
    link = tmp_path / f".codex-proxy-{'4' * 16}.tmp"
    link.symlink_to(others[1])
    os.utime(link, (now - 3_700, now - 3_700), follow_symlinks=False)
    (tmp_path / f".codex-proxy-{'5' * 16}.tmp").mkdir()
    os.utime(tmp_path / f".codex-proxy-{'5' * 16}.tmp", (now - 3_700, now - 3_700))
    with held.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        assert files.remove_leftovers([tmp_path, tmp_path / "none"], now=now) == 1
        assert held.exists()
    assert not old.exists()
    assert young.exists()
    assert link.is_symlink()
    assert all(path.exists() for path in others)
    assert files.remove_leftovers([tmp_path], now=now) == 1
    assert not held.exists()


def test_a_file_that_is_being_written_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    fsync = os.fsync

    def look_then_fsync(descriptor: int) -> None:
        # However long the disk takes.
        removed.append(files.remove_leftovers([tmp_path], now=time.time() + 10_000))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", look_then_fsync)
    files.write_atomic(tmp_path / "a.json", b"a")
    assert removed[0] == 0
    assert (tmp_path / "a.json").read_bytes() == b"a"


# -- locks --------------------------------------------------------------------------------


def test_a_lock_is_one_processs_at_a_time(tmp_path: Path) -> None:
    with files.lock(tmp_path, "a") as first, files.lock(tmp_path, "a") as second:
        assert (first, second) == (True, False)
        with files.lock(tmp_path, "b") as other:
            assert other
    with files.lock(tmp_path, "a", wait=True) as again:
        assert again
