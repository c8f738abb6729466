"""The right to write in a data-dir: one process has it."""

import subprocess
import sys
from pathlib import Path

import pytest

from codex_proxy.storage.lock import FILE, StoreLock


def test_one_has_it_until_it_is_given_back(tmp_path: Path) -> None:
    one, other = StoreLock(tmp_path), StoreLock(tmp_path)
    assert one.acquire("records")
    assert one.acquire("records")
    assert not other.acquire("records")
    one.release("records")
    assert other.acquire("records")
    assert not one.acquire("records")
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_it_is_held_until_all_its_stores_have_given_it_back(tmp_path: Path) -> None:
    one, other = StoreLock(tmp_path), StoreLock(tmp_path)
    assert one.acquire("records")
    assert one.acquire("ledger")
    one.release("records")
    assert not other.acquire("records")
    one.release("ledger")
    one.release("ledger")
    assert other.acquire("records")


def test_a_process_that_is_killed_has_it_no_longer(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from codex_proxy.storage.lock import StoreLock; "
        "lock = StoreLock(pathlib.Path(sys.argv[1])); print(lock.acquire('records'), flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, process.stdin, process.stdout:
        assert process.stdout.readline() == b"True\n"
        assert not StoreLock(tmp_path).acquire("records")
        process.kill()
        process.wait()
        assert StoreLock(tmp_path).acquire("records")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        StoreLock(tmp_path / "nowhere").acquire("records")
