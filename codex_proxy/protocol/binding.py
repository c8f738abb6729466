"""What a conversation is known by: the name that its caller gave it, else the way it begins.

By its binding a conversation finds the account of its last turn again, and the backend's cache finds
the conversation. The first of these that a request has counts:

| source                                    | what it is                                               |
|-------------------------------------------|----------------------------------------------------------|
| `session-id`, `session_id`, `thread-id`,  | a header. All threads of a Codex session are one         |
| `conversation_id`, `x-session-id`         | conversation here: the backend's own cache is asked by   |
|                                           | the session (it is the CLI's `prompt_cache_key`), a new  |
|                                           | thread begins with the same instructions and tools, or   |
|                                           | as a branch of its parent with reasoning that no other   |
|                                           | account reads. By thread, each would start cold.         |
| `claude session`, `claude agent`          | Claude Code's headers. An agent is a conversation of its |
|                                           | own: nothing that it sends but some tools is its         |
|                                           | parent's, and many run side by side.                     |
| `prompt_cache_key`                        | a field of Responses and Chat                            |
| `metadata.user_id`                        | the session that Claude Code writes into it, also where  |
|                                           | a relay has made it the `user`                           |
| `conversation`                            | a field of Chat, an id or an object with one             |
| `user`, `safety_identifier`               | with the beginning: alone it would be all that one       |
|                                           | person, or one tool, ever asks                           |
| `beginning`                               | model, the head of the instructions, the user's first    |
|                                           | words                                                    |

A name is its caller's word and believed: the same one is the same conversation wherever it stands. Two callers
share no key whatever they send, because the caller is part of each.

The beginning is what stands before the first answer, as words and data: whether a text is a string or a list of
parts, and the ids and marks around it, make no difference. Of the instructions only the head counts, and no
digit in it, since many callers write the time into them, and others what they have looked up for this turn.
What a first turn begins with is shared by all who say "hi", so it is marked as an opening.

Pure, and linear: each text is read once, and none when there is a name. What follows the first answer is
not looked at.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from codex_proxy.protocol.wire import BadJson, JsonObject, loads

SESSION_HEADERS: Final = ("session-id", "session_id", "thread-id", "conversation_id", "x-session-id")
"""Each is the source's name too; with an underscore, as older clients write them."""

CLAUDE_SESSION: Final = "claude session"
CLAUDE_AGENT: Final = "claude agent"
CACHE_KEY: Final = "prompt_cache_key"
USER_ID: Final = "metadata.user_id"
CONVERSATION: Final = "conversation"
USERS: Final = ("user", "safety_identifier")
BEGINNING: Final = "beginning"
CHAIN: Final = "previous_response_id"
"""The source of a turn that goes on from an answer; `server/continuations.py` remembers which."""

SOURCES: Final = (
    *SESSION_HEADERS, CLAUDE_SESSION, CLAUDE_AGENT, CACHE_KEY, USER_ID, CONVERSATION, CHAIN, *USERS, BEGINNING,
)  # fmt: skip
"""All sources, the strongest first."""

_GUESSES = frozenset({*USERS, BEGINNING})

_AGENT_HEADER = "x-claude-code-agent-id"
_CLAUDE_HEADER = "x-claude-code-session-id"

# Most requests have none of these: one look tells.
_NAMING_HEADERS = frozenset({*SESSION_HEADERS, _CLAUDE_HEADER})
_NAMING_FIELDS = frozenset({CACHE_KEY, "metadata", CONVERSATION, *USERS})

# `user_<hash>_account_<uuid>_session_<uuid>`, and nothing that only sounds like it.
_SESSION = re.compile(r"_session_([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\Z", re.IGNORECASE)

# Claude Code's own is 200 characters.
_MAX_USER_ID = 4096

# Roles differ in their first sentences; what is looked up anew for each turn comes after them.
_HEAD_LENGTH = 256

_DEVELOPERS = frozenset({"developer", "system"})
_CONTROLS = frozenset({"additional_tools", "compaction_trigger", "configuration_update"})
"""Items by which nobody says anything."""

_MARKS = frozenset({"cache_control", "detail", "prompt_cache_breakpoint", "type"})
"""What a part holds beside what it shows."""


@dataclass(slots=True)
class Binding:
    """What a conversation is known by."""

    key: str
    """A digest of the caller and what the source says; it gives neither away."""
    source: str
    """Where it was found: one of `SOURCES`."""
    is_opening: bool = False
    """Whether the key is made of how the conversation begins, and this is its first turn: many may begin
    alike, and need not crowd on one account."""
    also: str | None = None
    """Another key to remember the account under, for a next turn that will know it."""

    @property
    def is_guess(self) -> bool:
        """Whether nobody named the conversation, so that others may begin alike."""
        return self.source in _GUESSES

    def going_on(self) -> "Binding":
        """Return what a next turn is known by that goes on from this one's answer, and names nothing itself."""
        return Binding(self.also or self.key, CHAIN)


def bind(
    caller: str,
    headers: Mapping[str, str],
    said: JsonObject,
    *,
    model: str = "",
    instructions: Any = None,
    items: Any = None,
) -> Binding | None:
    """Return what the conversation of a request is known by; None when it has no name and no beginning.

    Args:
        caller: Who asks; `Caller.id`.
        headers: With lower-case names.
        said: The body as the caller wrote it, where names may stand.
        model: The model that reads it.
        instructions: The instructions that stand apart from the items.
        items: The conversation so far, as items of a Responses input or as its text; None where the endpoint
            has none.
    """
    named = _named(headers, said)
    if named is not None:
        source, name = named
        # One agent's part of it, whoever wrote the session down.
        return Binding(_key([caller, "name", name, _header(headers, _AGENT_HEADER)]), source)
    if items is None:
        return None
    source, user = BEGINNING, ""
    for field in USERS if not _NAMING_FIELDS.isdisjoint(said) else ():
        value = said.get(field)
        if isinstance(value, str) and value:
            source, user = field, value
            break
    texts = [caller, "beginning", user, model]
    is_opening = _add_beginning(texts, instructions, items)
    return Binding(_key(texts), source, is_opening)


def _named(headers: Mapping[str, str], said: JsonObject) -> tuple[str, str] | None:
    """Return the name that the caller gave to the conversation, and where it stands."""
    if not _NAMING_HEADERS.isdisjoint(headers):
        for header in SESSION_HEADERS:
            if value := _header(headers, header):
                return header, value
        if value := _header(headers, _CLAUDE_HEADER):
            return (CLAUDE_AGENT if _header(headers, _AGENT_HEADER) else CLAUDE_SESSION), value
    if _NAMING_FIELDS.isdisjoint(said):
        return None
    key = said.get(CACHE_KEY)
    if isinstance(key, str) and key:
        return CACHE_KEY, key
    metadata = said.get("metadata")
    for user in (metadata.get("user_id") if isinstance(metadata, dict) else None, said.get("user")):
        if isinstance(user, str) and (session := _session_in(user)):
            return USER_ID, session
    conversation = said.get(CONVERSATION)
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
    if isinstance(conversation, str) and conversation:
        return CONVERSATION, conversation
    return None


def _header(headers: Mapping[str, str], name: str) -> str:
    return headers.get(name, "").strip()


def _session_in(user: str) -> str | None:
    """Read the session out of Claude Code's user id: JSON, or a text that ends with it."""
    if len(user) > _MAX_USER_ID:
        return None
    if user.startswith("{"):
        try:
            value = loads(user)
        except BadJson:
            return None
        session = value.get("session_id") if isinstance(value, dict) else None
        return session if isinstance(session, str) else None
    found = _SESSION.search(user)
    return found[1] if found is not None else None


# Texts up to this in all are hashed in one piece; more of them are not copied for that.
_SHORT = 16 * 1024


def _key(texts: list[str]) -> str:
    """Return a digest of texts, each apart from the next."""
    # Of the good ones the fastest: a first message may be a picture of ten megabytes.
    digest = hashlib.sha256()
    if sum(map(len, texts)) <= _SHORT and (joined := "".join([f"{len(t)}:{t}" for t in texts])).isascii():
        digest.update(joined.encode("ascii"))
    else:
        for text in texts:
            # A header's odd bytes and half a UTF-16 pair are lone surrogates.
            data = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data))
            digest.update(data)
    return f"conv_{digest.hexdigest()[:32]}"


def _add_beginning(texts: list[str], instructions: Any, items: Any) -> bool:
    """Add how a conversation begins; tell whether it does not go on."""
    head = instructions if isinstance(instructions, str) else ""
    if isinstance(items, str):
        items = [{"role": "user", "content": items}]
    is_heard = False
    is_opening = True
    for item in items if isinstance(items, list) else ():
        if not isinstance(item, dict):
            continue
        role = item.get("role")
        if role == "user":
            is_heard = True
            _add_item(texts, "user", item)
        elif isinstance(role, str) and role in _DEVELOPERS:
            # What is said after the user is of this turn.
            if not head and not is_heard:
                shown: list[str] = []
                _show(item, shown)
                head = "".join(shown)
        else:
            kind = item.get("type")
            if isinstance(kind, str) and kind in _CONTROLS:
                continue
            if is_heard:
                is_opening = False
                break
            # A greeting, or what was compacted: the user's words come after it.
            _add_item(texts, "other", item)
    # Twice as much is read as counts, so that a digit more or less moves nothing in or out.
    texts += ("head", _without_digits(head[: 2 * _HEAD_LENGTH])[:_HEAD_LENGTH])
    return is_opening


def _without_digits(text: str) -> str:
    # By way of bytes it costs a fifth; in UTF-8 a digit's byte is nothing but a digit.
    data = text.encode("utf-8", "surrogatepass").translate(None, b"0123456789")
    return data.decode("utf-8", "surrogatepass")


def _add_item(texts: list[str], who: str, item: JsonObject) -> None:
    texts.append(who)
    _show(item, texts)
    sealed = item.get("encrypted_content")
    if isinstance(sealed, str):
        texts.append(sealed)


def _show(item: JsonObject, texts: list[str]) -> None:
    """Add the texts and the data that an item shows, in order, whatever their form; none that is empty."""
    content = item.get("content")
    if isinstance(content, str):
        if content:
            texts.append(content)
        return
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict):
            continue
        text = part.get("text")
        if isinstance(text, str):
            if text:
                texts.append(text)
            continue
        for key, value in part.items():
            if key in _MARKS:
                continue
            if isinstance(value, str):
                if value:
                    texts.append(value)
            elif isinstance(value, dict):
                texts += [inner for inner in value.values() if isinstance(inner, str) and inner]
