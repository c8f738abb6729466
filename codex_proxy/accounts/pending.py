"""What data-dir keeps for credential files: tokens on their way there, exchanges under way.

Two kinds of records, both found by the refresh token that a file holds:

- `*.tokens.json`: the answer of an exchange, written before its file is and removed after, so
  that a crash between the two loses nothing; and for as long as no file takes it.
- `*.exchange.json`: a refresh token is about to be spent. It is removed when the end is known,
  so one that is found at start tells of an answer that was lost. It holds a digest only.
"""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from codex_proxy.accounts import files
from codex_proxy.accounts.credential import Credential, token_of
from codex_proxy.accounts.files import Unusable
from codex_proxy.accounts.tokens import NewTokens, seconds_of, word_of

FOLDER = "pending"

_TOKENS = ".tokens.json"
_EXCHANGE = ".exchange.json"


def note_exchange(data_dir: Path, credential: Credential, *, now: float) -> bool:
    """Write down that *credential*'s refresh token is about to be spent; True when that is on disk.

    When the daemon dies before the answer is saved, the next one finds `interrupted` set and
    can say why the token is refused.
    """
    return _write(data_dir, credential.key + _EXCHANGE, _exchange(credential, now))


def note_refusal(data_dir: Path, credential: Credential, reason: str, *, now: float) -> bool:
    """Write down that the token of an interrupted exchange was tried again, and refused."""
    at = now if credential.interrupted is None else credential.interrupted
    return _write(data_dir, credential.key + _EXCHANGE, {**_exchange(credential, at), "refused": reason})


def clear_exchange(data_dir: Path, credential: Credential) -> None:
    """Take back `note_exchange`: its end is known and, if it brought tokens, they are saved."""
    with contextlib.suppress(OSError):
        os.unlink(data_dir / FOLDER / (credential.key + _EXCHANGE))


def keep(data_dir: Path, merged: Credential, now: float) -> bool:
    """Keep the tokens that *merged* has and its file has not; True when they are on disk."""
    if not merged.superseded:
        # The exchange brought no new refresh token: the file's own goes on being good, and
        # an access token alone can be had again.
        return False
    record = {
        "replaces": sorted(merged.superseded),
        "access_token": merged.access.reveal(),
        "refresh_token": merged.refresh.reveal(),
        "id_token": merged.id.reveal(),
        "expires_at": merged.expires_at,
        "saved_at": merged.last_refresh or now,
    }
    # Named after its token as well: another login's tokens may wait for the same account.
    name = f"{merged.key[:32]}-{merged.refresh.digest()[:16]}{_TOKENS}"
    with contextlib.suppress(Unusable):
        if files.read_json(data_dir / FOLDER / name)[0] == record:
            return True
    if not _write(data_dir, name, record):
        return False
    Pending.load(data_dir).forget(merged, but=name)
    return True


def _exchange(credential: Credential, at: float) -> dict[str, Any]:
    return {"refresh_digest": credential.refresh.digest(), "at": at}


def _write(data_dir: Path, name: str, record: dict[str, Any]) -> bool:
    folder = data_dir / FOLDER
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return files.write_atomic(folder / name, files.encode(record))
    except OSError:
        return False


@dataclass(slots=True, frozen=True)
class Waiting:
    """Tokens that wait for their file."""

    path: Path
    replaces: frozenset[str]
    tokens: NewTokens
    saved_at: float


@dataclass(slots=True, frozen=True)
class Exchange:
    """An exchange whose end was not written down."""

    path: Path
    refresh_digest: str
    at: float
    refused: str


@dataclass(slots=True)
class Pending:
    """All records, as they were when they were loaded."""

    by_old: dict[str, Waiting] = field(default_factory=dict)
    """By the digest of the refresh token that a file still holds."""
    by_new: dict[str, Waiting] = field(default_factory=dict)
    exchanges: dict[str, Exchange] = field(default_factory=dict)

    @classmethod
    def load(cls, data_dir: Path) -> "Pending":
        """Read all records; one that is broken says nothing and stays where it is."""
        pending = cls()
        try:
            names = [name for name, _ in files.listing(data_dir / FOLDER)]
        except OSError:
            return pending
        waiting: list[Waiting] = []
        for name in names:
            path = data_dir / FOLDER / name
            try:
                raw, _ = files.read_json(path)
                if name.endswith(_EXCHANGE):
                    exchange = _exchange_in(path, raw)
                    pending.exchanges[exchange.refresh_digest] = exchange
                elif name.endswith(_TOKENS):
                    waiting.append(_waiting(path, raw))
            except Unusable:
                continue
        for record in sorted(waiting, key=lambda record: record.saved_at):
            pending.by_old.update(dict.fromkeys(record.replaces, record))
            if record.tokens.refresh:
                pending.by_new[record.tokens.refresh.digest()] = record
        return pending

    def look_again(self, credential: Credential) -> Exchange | None:
        """Return the exchange of *credential*'s token whose end is still not written down."""
        digest = credential.refresh.digest()
        try:
            path = self.exchanges[digest].path
            exchange = _exchange_in(path, files.read_json(path)[0])
        except (KeyError, Unusable):
            return None
        return exchange if exchange.refresh_digest == digest else None

    def forget(self, credential: Credential, *, but: str = "") -> None:
        """Remove the records whose tokens *credential*'s file has, or has already replaced."""
        past = {credential.refresh.digest(), *credential.superseded}
        for digest in past & self.by_new.keys():
            path = self.by_new[digest].path
            if path.name != but:
                with contextlib.suppress(OSError):
                    os.unlink(path)


def _exchange_in(path: Path, raw: dict[str, Any]) -> Exchange:
    at, digest, refused = seconds_of(raw.get("at")), word_of(raw.get("refresh_digest")), raw.get("refused")
    if at is None or digest is None:
        raise Unusable("not a record of an exchange")
    return Exchange(path, digest, at, refused if isinstance(refused, str) else "")


def _waiting(path: Path, raw: dict[str, Any]) -> Waiting:
    replaces, saved_at = raw.get("replaces"), seconds_of(raw.get("saved_at"))
    access, refresh, id_token = (
        token_of(raw, name) for name in ("access_token", "refresh_token", "id_token")
    )
    if not isinstance(replaces, list) or saved_at is None or not (access or refresh):
        raise Unusable("not a record of tokens")
    expires_at = seconds_of(raw.get("expires_at"))
    return Waiting(
        path,
        frozenset(word for item in replaces if (word := word_of(item))),
        NewTokens(
            access or None,
            refresh or None,
            id_token or None,
            None if expires_at is None else expires_at - saved_at,
        ),
        saved_at,
    )
