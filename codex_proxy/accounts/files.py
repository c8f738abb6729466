"""Files that hold secrets: read once and whole, replaced in one step, moved without a gap.

Everything here blocks on a disk and belongs in a thread. No message names a path, because a
file may be called after an e-mail address.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from codex_proxy.errors import ProxyError

# A credential file has a few kilobytes; what is larger is something else.
MAX_FILE_SIZE = 1024 * 1024

# A temporary file this old was left by a process that was killed: writing one takes a moment.
LEFTOVER_SECONDS = 3_600.0

SUFFIX = ".json"
TEMPORARY_PREFIX = ".codex-proxy-"
LOCK_FOLDER = ".codex-proxy-locks"

# How many names are tried for a file whose own is taken.
_NAME_TRIES = 1_000

# A file may be changed while it is copied; each try copies what it is then.
_MOVE_TRIES = 5


class Unusable(ProxyError):
    """A file is no credential; the message says why and nothing of what is in it."""

    def __init__(self, message: str, *, is_final: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        """It is not there, or it is whole and holds no login."""


# -- reading ------------------------------------------------------------------------------


def listing(folder: Path) -> list[tuple[str, bool]]:
    """Return the names of the files in *folder* that may hold credentials, in order, and which are symlinks.

    Raises:
        OSError: If the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, entry.is_symlink())
            for entry in entries
            if entry.name.lower().endswith(SUFFIX) and not entry.name.startswith(".")
        )


def resolve(path: Path) -> Path:
    """Return the file itself, behind any symlinks.

    Raises:
        Unusable: If there is none.
    """
    try:
        return path.resolve(strict=True)
    except FileNotFoundError:
        reason = "symlink to a file that is not there" if path.is_symlink() else "not there any more"
        raise Unusable(reason, is_final=True) from None
    except (RuntimeError, OSError) as exc:
        # Below 3.13 a loop is a RuntimeError.
        if isinstance(exc, RuntimeError) or exc.errno == errno.ELOOP:
            raise Unusable("symlink that leads to itself") from None
        raise Unusable(f"not readable: {why(exc)}") from None


def read(target: Path, *, limit_bytes: int = MAX_FILE_SIZE) -> tuple[bytes, os.stat_result]:
    """Return what a file holds, and its state at that moment.

    Raises:
        Unusable: If it cannot be read, is no file, or holds more than *limit_bytes*.
    """
    try:
        # Non-blocking, because opening a named pipe would wait for its other end.
        descriptor = os.open(target, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        raise Unusable(f"not readable: {why(exc)}") from None
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise Unusable("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("not a regular file")
        # One that says it is larger need not be read to be believed.
        data = b"" if status.st_size > limit_bytes else _read_up_to(descriptor, limit_bytes + 1)
    except OSError as exc:
        raise Unusable(f"not readable: {why(exc)}") from None
    finally:
        os.close(descriptor)
    if max(len(data), status.st_size) > limit_bytes:
        raise Unusable(f"larger than {limit_bytes // 2**20} MiB")
    return data, status


def read_json(target: Path) -> tuple[dict[str, Any], os.stat_result]:
    """Return the JSON object that a file holds, and its state at that moment.

    Raises:
        Unusable: If it holds none.
    """
    data, status = read(target)
    return decode(data), status


def _read_up_to(descriptor: int, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    while limit_bytes > 0 and (part := os.read(descriptor, limit_bytes)):
        parts.append(part)
        limit_bytes -= len(part)
    return b"".join(parts)


def decode(data: bytes) -> dict[str, Any]:
    """Return the JSON object in *data*.

    Raises:
        Unusable: If there is none.
    """
    # The standard library's parser on purpose: it gives back every integer as it was, and
    # what we do not know must be written as it was read.
    if not data.strip():
        raise Unusable("empty")
    try:
        document = json.loads(
            data.decode("utf-8-sig"), parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except UnicodeDecodeError as exc:
        raise Unusable(f"not UTF-8 at byte {exc.start}") from None
    except json.JSONDecodeError as exc:
        raise Unusable(not_json(exc)) from None
    except RecursionError:
        raise Unusable("not JSON: nested too deep") from None
    except ValueError:
        raise Unusable("not JSON: a number out of range") from None
    if not isinstance(document, dict):
        raise Unusable("not a JSON object")
    return document


def not_json(exc: json.JSONDecodeError) -> str:
    """Say where a text stops being JSON."""
    # Some of the parser's messages end in the word that introduces the place.
    return f"not JSON: {exc.msg.removesuffix(' at')} at line {exc.lineno} column {exc.colno}"


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _finite_float(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise ValueError("too large")
    return value


def encode(raw: dict[str, Any]) -> bytes:
    """Return *raw* as a person may read it."""
    try:
        return (json.dumps(raw, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # Half a surrogate pair, which only an escape can carry.
        return (json.dumps(raw, indent=2) + "\n").encode()


# -- writing ------------------------------------------------------------------------------


def write_atomic(
    target: Path, data: bytes, *, expected: os.stat_result | None = None, mode: int = 0o600
) -> bool:
    """Replace *target* by *data* in one step, readable by its owner only unless *mode* says more.

    With *expected*, only when the file is still in that state; False when it is not.

    Raises:
        OSError: If it could not be done; *target* is as it was.
    """
    with _temporary(target.parent, data, expected, mode) as temporary:
        if expected is not None and not _is_unchanged(target, expected):
            return False
        os.replace(temporary, target)
    # The new name is there for everyone; only whether it outlives a power cut is open, and
    # some file systems cannot be asked.
    with contextlib.suppress(OSError):
        sync_folder(target.parent)
    return True


def write_new(folder: Path, stem: str, data: bytes, *, owner: os.stat_result | None = None) -> Path:
    """Write *data* into a file of its own, called *stem* or, where that is taken, *stem*-2 and so on.

    It appears whole; nobody ever sees a part of it, and nobody's file is replaced.

    Raises:
        OSError: If it could not be done.
    """
    mode = 0o600 if owner is None else stat.S_IMODE(owner.st_mode)
    with _temporary(folder, data, owner, mode) as temporary:

        def place(target: Path) -> None:
            try:
                os.link(temporary, target, follow_symlinks=False)
            except OSError as exc:
                if exc.errno == errno.EEXIST:
                    raise
                # A file system without hard links: the name is taken first, then filled.
                _reserve(target)
                try:
                    os.replace(temporary, target)
                except BaseException:
                    os.unlink(target)
                    raise

        target = _first_free(folder, stem, place)
    with contextlib.suppress(OSError):
        sync_folder(folder)
    return target


def move(path: Path, folder: Path) -> Path:
    """Move a file or a symlink into *folder* under its own name, or one like it; return where it is.

    It is at its old place, its new place, or for a moment at both; never at none. A symlink
    is moved, not what it leads to.

    Raises:
        OSError: If it could not be done; *path* is as it was.
    """
    if path.is_symlink():
        # A relative one would lead elsewhere from there.
        leads_to = path.parent.absolute() / os.readlink(path)
        target = _first_free(folder, path.stem, lambda free: os.symlink(leads_to, free))
        os.unlink(path)
        return target
    target = _first_free(folder, path.stem, _reserve)
    try:
        try:
            os.rename(path, target)
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            _move_across(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            if os.path.lexists(path) or target.stat().st_size == 0:
                os.unlink(target)
        raise
    for place in {folder, path.parent}:
        with contextlib.suppress(OSError):
            sync_folder(place)
    return target


def probe(folder: Path) -> None:
    """Find out whether files can be made and renamed in *folder*; nothing is left of it.

    Raises:
        OSError: If they cannot.
    """
    with _temporary(folder, b"{}", None, 0o600):
        pass


def _reserve(target: Path) -> None:
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _move_across(path: Path, target: Path) -> None:
    """Copy a file to another file system, and remove it here once the copy is of its last state."""
    for _ in range(_MOVE_TRIES):
        try:
            data, seen = read(path)
        except Unusable as exc:
            raise OSError(errno.ENOENT, exc.message) from exc
        write_atomic(target, data, mode=stat.S_IMODE(seen.st_mode))
        if _is_unchanged(path, seen):
            os.unlink(path)
            return
    raise OSError(errno.EBUSY, "the file is being changed all the time")


def _first_free(folder: Path, stem: str, place: Callable[[Path], None]) -> Path:
    for number in range(1, _NAME_TRIES):
        target = folder / f"{stem if number == 1 else f'{stem}-{number}'}{SUFFIX}"
        try:
            place(target)
        except FileExistsError:
            continue
        return target
    raise FileExistsError(errno.EEXIST, "no free name")


@contextlib.contextmanager
def _temporary(folder: Path, data: bytes, owner: os.stat_result | None, mode: int) -> Iterator[Path]:
    """Write *data* into a hidden file in *folder*, flushed; gone afterwards unless it was renamed."""
    # Beside the target, because a rename is one step only within a file system; hidden, so
    # that no scan takes it for a credential; exclusive, so that nobody's file is followed.
    temporary = folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        try:
            # Held while it is written, so that nobody takes it for a leftover.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(descriptor, mode)
            if owner is not None and (owner.st_uid, owner.st_gid) != (os.geteuid(), os.getegid()):
                # Run as root in a container over a user's folder: the file stays the user's.
                with contextlib.suppress(OSError):
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        yield temporary
    finally:
        # Gone already when it was renamed.
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _is_unchanged(target: Path, expected: os.stat_result) -> bool:
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return False
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (
        expected.st_ino,
        expected.st_size,
        expected.st_mtime_ns,
        expected.st_ctime_ns,
    )


def sync_folder(folder: Path) -> None:
    """Flush the names in *folder*.

    Raises:
        OSError: If the file system cannot be asked.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folders: Iterable[Path], *, now: float) -> int:
    """Remove the temporary files that killed processes left in *folders*; return how many."""
    count = 0
    for folder in folders:
        try:
            found = [name for name in os.listdir(folder) if _TEMPORARY.fullmatch(name)]
        except OSError:
            continue
        for name in found:
            with contextlib.suppress(OSError):
                count += _remove_leftover(folder / name, now)
    return count


_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"[0-9a-f]+\.tmp")


def _remove_leftover(path: Path, now: float) -> bool:
    if now - path.lstat().st_mtime < LEFTOVER_SECONDS:
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(descriptor)
    return True


# -- locks --------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path, name: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock *name* of *folder* among all processes; False when another one has it.

    Where no lock can be made (a read-only folder), nobody is kept out.

    Args:
        wait: Stay until it is free.
    """
    descriptor = _open_lock(folder / LOCK_FOLDER, name)
    if descriptor is None:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks
        yield True
    finally:
        os.close(descriptor)


def _open_lock(folder: Path, name: str) -> int | None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        # Never removed: whoever waits for a lock on a removed file holds nothing.
        return os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None


def why(exc: OSError) -> str:
    """Name an operating system's error without the path, which may be an e-mail address."""
    return os.strerror(exc.errno).lower() if exc.errno else "unknown error"
