"""The secrets that we make ourselves when nobody set any: a client key, and a word that opens the page once."""

import contextlib
import hmac
import logging
import os
import re
import secrets
from pathlib import Path
from typing import TextIO

from codex_proxy.config import Settings
from codex_proxy.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = "client-key"
SETUP = "setup-token"
"""Opens the page once, within a day; whoever can read data-dir may use it, and can have another one made."""

SETUP_SECONDS = 86_400.0

# Ours is "cp-" and 43 characters; another one that a person wrote there is as good when it is
# long enough not to be guessed and survives a header.
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{16,256}")


def needs_key(settings: Settings) -> bool:
    """Tell whether a key must be generated: keys are asked for, none is set, a network can reach us."""
    return settings.auth == "keys" and not settings.api_keys and not settings.is_loopback


def ensure_client_key(data_dir: Path) -> tuple[str, bool]:
    """Return the generated client key and whether this call made it.

    Two daemons that start at once on one folder agree on one key: it is written in full
    beside its place and linked there, which fails for the second.

    Raises:
        ConfigError: If the folder or the file cannot be used.
    """
    path = data_dir / NAME
    try:
        if not path.exists():
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _create(path, key := "cp-" + secrets.token_urlsafe(32)):
                return key, True
        return _read(path), False
    except OSError as exc:
        raise ConfigError(
            f"data-dir: {path}: {exc.strerror or type(exc).__name__}; the generated client key is kept there"
        ) from exc


def read_client_key(data_dir: Path) -> str | None:
    """Return the generated client key, None when there is none yet.

    Raises:
        ConfigError: If the file cannot be used.
    """
    path = data_dir / NAME
    try:
        return _read(path) if path.exists() else None
    except OSError as exc:
        raise ConfigError(f"data-dir: {path}: {exc.strerror or type(exc).__name__}") from exc


def announce(key: str, created: bool, data_dir: Path, terminal: TextIO) -> None:
    """Say where the key is; a terminal sees the key itself, once, a log never does."""
    path = data_dir / NAME
    logger.warning("client key required created=%s file=%s show=`codex-proxy key`", created, path)
    if created and terminal.isatty():
        terminal.write(f"\nGenerated client key (shown once, kept in {path}):\n\n    {key}\n\n")
        terminal.flush()


def may_set_up(settings: Settings) -> bool:
    """Tell whether the set-up token opens the page: no key that somebody chose does."""
    return settings.admin_key is None and not settings.api_keys


def make_setup_token(data_dir: Path) -> tuple[str, Path]:
    """Write a new set-up token, in place of one that is there; return it and where it is.

    Raises:
        ConfigError: If it cannot be written.
    """
    path, token = data_dir / SETUP, "setup-" + secrets.token_urlsafe(32)
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        _write(path, token)
    except OSError as exc:
        raise ConfigError(
            f"data-dir: {path}: {exc.strerror or type(exc).__name__}; the set-up token is kept there"
        ) from exc
    return token, path


def take_setup_token(data_dir: Path, said: str, now: float) -> bool:
    """Use the set-up token up, if *said* is it; False when it is not, is too old or is gone."""
    path = data_dir / SETUP
    try:
        with path.open("rb") as file:
            made = os.fstat(file.fileno()).st_mtime
            token = file.read(4096).decode("ascii", "replace").strip()
        # One from a future was made by a clock that was ahead; nobody knows how old it is.
        if not token or abs(now - made) > SETUP_SECONDS:
            return False
        if not hmac.compare_digest(said.encode("utf-8", "surrogateescape"), token.encode()):
            return False
        # Of two who know it, the one who takes the file away comes in.
        path.unlink()
    except OSError:
        return False
    return True


def offer_setup(settings: Settings) -> None:
    """Make a set-up token, where one opens the page, and say where it is; a log never sees it.

    Without one the daemon serves all the same: it is for the page alone, and another can be made later.
    """
    if settings.ui == "off" or not may_set_up(settings):
        return
    try:
        _, path = make_setup_token(settings.data_dir)
    except ConfigError as exc:
        logger.warning("no set-up token for the page: %s", exc.message)
        return
    logger.warning(
        "the page asks for a key: log in at /ui with the set-up token, which is good once and for a day file=%s "
        "another=`codex-proxy setup-token`",
        path,
    )


def _create(path: Path, key: str) -> bool:
    beside = path.with_name(f".{NAME}.{secrets.token_hex(8)}")
    try:
        _write(beside, key)
        try:
            os.link(beside, path)
        except FileExistsError:
            return False
        except OSError:
            # Some mounted file systems know no links. Exclusive creation is then the best
            # there is: a reader may for an instant find the file empty, and says so.
            try:
                _write(path, key)
            except FileExistsError:
                return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _write(path: Path, key: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str:
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        if mode & 0o077:
            os.fchmod(file.fileno(), 0o600)
            logger.warning("client key file was open to others mode=%o file=%s", mode & 0o777, path)
        text = file.read(4096).decode("ascii", "replace").strip()
    if _KEY.fullmatch(text) is None:
        state = "holds no usable key" if text else "is empty"
        raise ConfigError(f"data-dir: {path} {state}; delete it to have a new one generated, or set api-keys")
    return text
