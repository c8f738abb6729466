"""Logins that lie elsewhere, brought into auth-dir; what is there is only read.

A source is a file or a folder. A file holds one account (the Codex CLI's `auth.json`, the Go
daemon's), a JSON array of them, or one on each line. Everything that a source holds is an item
with its place; one that is no use is an item too, with the reason.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from codex_proxy.accounts import files, store
from codex_proxy.accounts.credential import Credential, parse
from codex_proxy.accounts.files import Unusable
from codex_proxy.accounts.tokens import mask_name
from codex_proxy.errors import ProxyError

# Tens of thousands of accounts; more is a mistake.
MAX_SOURCE_SIZE = 256 * 1024 * 1024

CLI_FILE = "auth.json"
"""What the Codex CLI calls its file."""

# What else lies in the Codex CLI's own folder, whatever that is called: none of it is an account.
_CLI_TRACES = ("config.toml", "sessions", "history.jsonl", "models_cache.json", "installation_id")
_LINES = (".jsonl", ".ndjson")
# The Go daemon renames the file of an account that it gave up.
_DISABLED = re.compile(r"(?P<name>.+\.json)\.disabled(\.\d+)?", re.IGNORECASE)
# A name that says nothing but what kind of file it is.
_COMMON_STEMS = frozenset({"auth", "accounts", "credentials", "tokens", "token"})

Outcome = Literal["imported", "updated", "already there", "refused"]
OUTCOMES: tuple[Outcome, ...] = ("imported", "updated", "already there", "refused")


@dataclass(slots=True, frozen=True)
class Item:
    """One account of a source, or what stands where one should."""

    place: str
    """Where it is, e-mail addresses masked."""
    raw: dict[str, Any] | None = None
    reason: str = ""
    """Why there is no account; '' when there is one."""
    name: str | None = None
    """What its file may be called; None for a name of ours."""
    is_disabled: bool = False
    """Its file's name says that it is out of use."""


@dataclass(slots=True, frozen=True)
class Brought:
    """What became of an item."""

    item: Item
    outcome: Outcome
    credential: Credential | None = None
    """What auth-dir holds now; None when it was refused."""
    reason: str = ""
    notes: tuple[str, ...] = ()
    """What its owner should know of it."""

    @property
    def is_of_the_cli(self) -> bool:
        """Whether it came from a file of the Codex CLI's, which may go on using the same login."""
        return self.item.raw is not None and isinstance(self.item.raw.get("tokens"), dict)


def bring(items: Iterable[Item], auth_dir: Path, *, now: float) -> Iterator[Brought]:
    """Put the accounts into *auth_dir*, and tell of each item what became of it.

    An account that is there already gets newer tokens, and keeps all else.
    """
    with store.Adding(auth_dir, now=now) as adding:
        for item in items:
            if item.raw is None:
                yield Brought(item, "refused", reason=item.reason)
                continue
            raw = {**item.raw, "disabled": True} if item.is_disabled else item.raw
            try:
                added = adding.add(raw, name=item.name)
            except ProxyError as exc:
                yield Brought(item, "refused", reason=exc.message)
                continue
            outcome: Outcome = {"added": "imported", "updated": "updated", "kept": "already there"}[
                added.outcome
            ]  # type: ignore[assignment]  # mypy widens the values of a dict
            notes = tuple(_notes(added.credential, raw, now)) if outcome != "already there" else ()
            yield Brought(item, outcome, added.credential, notes=notes)


def _notes(credential: Credential, raw: dict[str, Any], now: float) -> Iterator[str]:
    _, complaints = parse(credential.path, credential.target, raw, 0)
    yield from complaints
    if credential.disabled:
        yield "it is disabled"
    if not credential.refresh:
        is_over = credential.expires_at is not None and credential.expires_at <= now
        yield (
            "it has no refresh token and its access token is over: log it in"
            if is_over
            else "it has no refresh token, so it serves only until its access token ends"
        )


def read(paths: Iterable[Path]) -> Iterator[Item]:
    """Yield everything that *paths* hold."""
    for path in paths:
        try:
            if path.is_dir():
                yield from _folder(path)
            else:
                yield from _file(path)
        except OSError as exc:
            yield Item(mask_name(str(path)), reason=f"not readable: {files.why(exc)}")


def _folder(folder: Path) -> Iterator[Item]:
    if (folder / CLI_FILE).exists() and (
        folder.name == ".codex" or any((folder / trace).exists() for trace in _CLI_TRACES)
    ):
        yield from _file(folder / CLI_FILE)
        return
    found = sorted(name for name in os.listdir(folder) if _may_hold_accounts(name))
    if not found:
        yield Item(mask_name(str(folder)), reason="no account file in this folder")
    for name in found:
        yield from _file(folder / name)


def _may_hold_accounts(name: str) -> bool:
    lower = name.lower()
    return not name.startswith(".") and (
        lower.endswith((files.SUFFIX, *_LINES)) or _DISABLED.fullmatch(name) is not None
    )


def _file(path: Path) -> Iterator[Item]:
    try:
        text = _text(path)
    except Unusable as exc:
        yield Item(mask_name(str(path)), reason=exc.message)
        return
    yield from read_text(path, text)


def read_text(path: Path, text: str) -> Iterator[Item]:
    """Yield everything that a file called *path* would hold, if this were in it; nothing is opened."""
    place = mask_name(str(path))
    disabled = _DISABLED.fullmatch(path.name)
    try:
        if path.suffix.lower() in _LINES or _is_lines(text):
            yield from _lines(text, place)
            return
        whole = _load(text)
    except Unusable as exc:
        yield Item(place, reason=exc.message)
        return
    if isinstance(whole, list):
        if not whole:
            yield Item(place, reason="an empty list")
        for number, raw in enumerate(whole, 1):
            yield _item(f"{place} item {number}", raw)
        return
    name = disabled["name"] if disabled is not None else path.name
    yield _item(place, whole, name=_own_name(name), is_disabled=disabled is not None)


def _lines(text: str, place: str) -> Iterator[Item]:
    is_empty = True
    # By line feeds only: a text may hold other separators as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        is_empty = False
        try:
            yield _item(f"{place} line {number}", _load(line))
        except Unusable as exc:
            # There is but one line in it.
            yield Item(f"{place} line {number}", reason=exc.message.replace(" line 1 column", " column"))
    if is_empty:
        yield Item(place, reason="empty")


def _item(place: str, raw: object, *, name: str | None = None, is_disabled: bool = False) -> Item:
    if not isinstance(raw, dict):
        return Item(place, reason="not a JSON object")
    if len(files.encode(raw)) > files.MAX_FILE_SIZE:
        return Item(place, reason="larger than 1 MiB")
    return Item(place, raw, name=name, is_disabled=is_disabled)


def _own_name(name: str) -> str | None:
    """Return the name that a file keeps; None when it gives an address away or says nothing."""
    stem = Path(name).stem
    return None if "@" in stem or stem.lower() in _COMMON_STEMS else stem


def _is_lines(text: str) -> bool:
    """Tell whether the first line with anything in it is an account of its own, and more follow."""
    head, _, rest = text.lstrip().partition("\n")
    if not rest.strip():
        return False
    try:
        return isinstance(json.loads(head), dict)
    except (ValueError, RecursionError):
        return False


def _load(text: str) -> object:
    if not text.strip():
        raise Unusable("empty")
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as exc:
            raise Unusable(files.not_json(exc)) from None
        except (ValueError, RecursionError):
            raise Unusable("not JSON") from None
    # An account is read as the daemon will read it.
    return files.decode(text.encode("utf-8", "surrogatepass"))


def _text(path: Path) -> str:
    data, _ = files.read(path, limit_bytes=MAX_SOURCE_SIZE)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise Unusable(f"not UTF-8 at byte {exc.start}") from None
