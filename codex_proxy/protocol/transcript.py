"""Conversations that the caller does not send again: the items so far, and how a turn goes on from them.

A transcript grows by a link to the one before it, so a turn of a long conversation adds its own items and
copies nothing. What was sent is kept as bytes and taken apart when somebody goes on from it: most answers
are never gone on from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.binding import Binding
from codex_proxy.protocol.catalog import Catalog
from codex_proxy.protocol.request import BackendRequest
from codex_proxy.protocol.responses_request import decode_fields
from codex_proxy.protocol.wire import JsonObject, dumps, loads_lenient

PREVIOUS = "previous_response_id"

_TRIGGER = "compaction_trigger"


@dataclass(slots=True, frozen=True, eq=False)
class Transcript:
    """One turn of a conversation, linked to the turns before it."""

    sent: bytes
    """What the turn sent: a JSON list of items, or a whole request body that has them under `input`."""
    answered: bytes
    """The items of its answer, as the caller saw them: a JSON list."""
    before: "Transcript | None" = None
    binding: Binding | None = None
    """What the conversation is known by, for a next turn that names nothing itself."""

    @property
    def own_bytes(self) -> int:
        """How much this turn holds itself."""
        return len(self.sent) + len(self.answered)

    def size(self) -> int:
        """Return how much the whole conversation holds."""
        return sum(turn.own_bytes for turn in self.turns())

    def turns(self) -> list["Transcript"]:
        """Return the turns, the first one first."""
        turns: list[Transcript] = []
        turn: Transcript | None = self
        while turn is not None:
            turns.append(turn)
            turn = turn.before
        turns.reverse()
        return turns

    def items(self) -> list[Any]:
        """Return all items in the order in which the model is to read them; new objects each time."""
        items: list[Any] = []
        for turn in self.turns():
            sent = loads_lenient(turn.sent)
            items += _listed(sent.get("input") if isinstance(sent, dict) else sent)
            items += loads_lenient(turn.answered)
        # It asks for something and is no part of a conversation; the backend takes it in the last place only.
        return [item for item in items if not (isinstance(item, dict) and item.get("type") == _TRIGGER)]


def go_on(
    request: BackendRequest, sent: bytes, before: Transcript | None, final: JsonObject
) -> tuple[str, Transcript] | None:
    """Return the id of an answer that ended well and the conversation up to it; None if it has no id.

    Args:
        request: What was asked.
        sent: What the caller sent this time; see `Transcript.sent`.
        before: What it went on from.
        final: `id` and `output` of the final response object, as the caller sees them.
    """
    response_id, output = final.get("id"), final.get("output")
    if not isinstance(response_id, str) or not response_id:
        return None
    answered = dumps(output if isinstance(output, list) else [])
    binding = request.binding.going_on() if request.binding is not None else None
    return response_id, Transcript(sent, answered, before, binding)


def take_previous(fields: JsonObject) -> str | None:
    """Take the id of the answer that a request goes on from out of *fields*; None when it names none.

    Raises:
        RequestError: If it is no string.
    """
    value = fields.pop(PREVIOUS, None)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise RequestError(f"{PREVIOUS} must be a string", param=PREVIOUS, code="invalid_type")
    return value


def not_found(response_id: str) -> RequestError:
    """Return the error for an answer that nobody remembers; clients that know it send everything again."""
    return RequestError(
        f"previous response with id {response_id[:100]!r} not found: answers are remembered for a while, for "
        "the key that asked, and not with store: false; send the whole conversation as input",
        param=PREVIOUS,
        code="previous_response_not_found",
    )


def decode_continued(
    fields: JsonObject,
    headers: Mapping[str, str],
    *,
    catalog: Catalog,
    caller: str = "",
    response_id: str,
    before: Transcript,
    new_bytes: int,
    limit: int,
) -> BackendRequest:
    """Decode a request that sends only what is new; *fields* is changed in place.

    As in the public API the instructions of earlier turns do not come along, only items do.

    Args:
        response_id: The answer that it goes on from, already taken out of *fields*.
        before: The conversation up to that answer.
        new_bytes: How much the caller sent this time.
        limit: How many bytes the whole may measure.

    Raises:
        RequestError: As for any request, with the paths that the caller knows.
    """
    if before.size() + new_bytes > limit:
        raise RequestError(
            f"the conversation has grown beyond {limit} bytes (setting max-body-bytes); compact it, or begin "
            "a new one",
            param=PREVIOUS,
            code="request_too_large",
            status=413,
        )
    old = before.items()
    new = fields.get("input")
    if new is None or isinstance(new, str | list):
        fields["input"] = old + _listed(new)
    try:
        request = decode_fields(fields, headers, catalog=catalog, caller=caller)
    except RequestError as exc:
        raise _as_sent(exc, len(old)) from exc
    request.previous_response_id = response_id
    if before.binding is not None and (request.binding is None or request.binding.is_guess):
        # Others may begin alike, and live elsewhere.
        request.binding = before.binding
    return request


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": value}]}]
    return value if isinstance(value, list) else []


def _as_sent(error: RequestError, offset: int) -> RequestError:
    """Count an error's path from where the caller's own items begin."""
    head, _, rest = (error.param or "").partition(".")
    number, _, _ = rest.partition(".")
    if head != "input" or not number.isdecimal() or int(number) < offset:
        return error
    theirs = f"input.{int(number) - offset}"
    path = theirs + rest.removeprefix(number)
    message = error.message.replace(f"input.{number}", theirs)
    return RequestError(message, param=path, code=error.code, status=error.status, type=error.type)
