"""How one operation of the admin API is done: decode strictly, do it, encode."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args, get_type_hints

import msgspec

from codex_proxy.errors import RequestError
from codex_proxy.server.gateway.desk import Call, Csv, Desk
from codex_proxy.server.gateway.operations import Answered, Operation
from codex_proxy.server.gateway.shapes import MONEY_FORM, Nothing

_PLACE = re.compile(r" - at `\$\.?([^`]*)`$")
_FIELD = re.compile(r"field `([^`]*)`")


@lru_cache(maxsize=256)
def types_of(operation: Operation) -> tuple[Any, Any, Any]:
    """Return what comes as query and as body, and what is answered."""
    hints = get_type_hints(operation.handler(), include_extras=True)
    query, body = get_args(hints["call"])
    return query, body, hints["return"]


async def perform(
    operation: Operation, desk: Desk, name: str, query: Mapping[str, str], body: bytes, actor: str
) -> Answered:
    """Decode what was asked, do it, and encode what came of it.

    Raises:
        ProxyError: What keeps it from being done.
    """
    asked, sent, _ = types_of(operation)
    call = Call(name, decode_query(query, asked), decode_body(body, sent), actor)
    answer = await operation.handler()(desk, call)
    if isinstance(answer, Csv):
        return Answered(operation.status, "text/csv", answer.data, answer.name)
    return Answered(operation.status, "application/json", encode(answer))


def encode(value: object) -> bytes:
    """Return an answer as JSON."""
    return msgspec.json.encode(value)


def decode_body(raw: bytes, kind: Any) -> Any:
    """Return a body as *kind*.

    Raises:
        RequestError: If it is none; it names the field.
    """
    if kind is Nothing and not raw.strip():
        return Nothing()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.ValidationError as exc:
        raise _refusal(str(exc)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise RequestError(f"the body is not JSON: {str(exc)[:200]}", code="invalid_json") from None


def decode_query(query: Mapping[str, str], kind: Any) -> Any:
    """Return a query as *kind*; what is empty counts as left out.

    Raises:
        RequestError: If it is none; it names the parameter.
    """
    for name, text in query.items():
        # Also what was no UTF-8.
        if not (name.isprintable() and text.isprintable()):
            shown = ascii(name)[1:-1][:40]
            raise RequestError(f"{shown}: has characters that cannot be seen", param=shown)
    try:
        return msgspec.convert({key: text for key, text in query.items() if text}, kind, strict=False)
    except msgspec.ValidationError as exc:
        raise _refusal(str(exc)) from None


def _refusal(message: str) -> RequestError:
    """Turn what msgspec says into an error of ours."""
    place = _PLACE.search(message)
    path = re.sub(r"\[([^\]]*)\]", r".\1", place[1]).strip(".") if place else ""
    what = message[: place.start()] if place else message
    field = _FIELD.search(what)
    param = ".".join(part for part in (path, field[1] if field else "") if part) or None
    if repr(MONEY_FORM) in what or MONEY_FORM in what:
        what = "is no amount of dollars: a decimal text such as '12.50', with nine places at most"
    what = what.replace("`", "'")
    said = f"{param}: {what[:1].lower()}{what[1:]}" if param else f"{what[:1].lower()}{what[1:]}"
    return RequestError(said, param=param)
