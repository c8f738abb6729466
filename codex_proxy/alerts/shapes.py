"""What a message looks like to those who take it: one function for each shape, and what counts as taken."""

import base64
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from codex_proxy.accounts.telling import in_words
from codex_proxy.alerts.episodes import Told
from codex_proxy.config import Webhook
from codex_proxy.net import Reply
from codex_proxy.protocol.wire import BadJson, dumps, loads

TEST = "test"
"""The name of an alert that is none."""

# More than these say nothing new, and chats refuse long messages: Telegram past 4,096 characters.
_MOST = 10
_MAX_LENGTH = 4_000


@dataclass(slots=True, frozen=True)
class Message:
    """Some news that goes out together."""

    at: float
    """Wall clock."""
    news: tuple[Told, ...]


def text_of(message: Message, host: str) -> str:
    """Return a message as people read it."""
    lines = [f"codex-proxy on {host}"]
    for told in message.news[:_MOST]:
        if told.name == TEST:
            lines.append(told.text)
        elif told.resolved_at is None:
            lines.append(f"[firing] {told.name}: {told.text}")
        else:
            lines.append(
                f"[resolved] {told.name}: over after {in_words(told.resolved_at - told.since)}; it was: {told.text}"
            )
    if len(message.news) > _MOST:
        lines.append(f"and {len(message.news) - _MOST} more")
    return "\n".join(lines)[:_MAX_LENGTH]


def render(hook: Webhook, message: Message, host: str, now: float) -> tuple[str, bytes]:
    """Return where a message goes, and its body; *now* is what a signature is made of."""
    return _SHAPES[hook.shape](hook, message, host, now)


def _generic(hook: Webhook, message: Message, host: str, now: float) -> tuple[str, bytes]:
    is_test = all(told.name == TEST for told in message.news)
    is_over = all(told.resolved_at is not None for told in message.news)
    body = {
        "source": "codex-proxy",
        "host": host,
        "at": message.at,
        "status": TEST if is_test else "resolved" if is_over else "firing",
        "text": text_of(message, host),
        "alerts": [
            {
                "name": told.name,
                "status": "firing" if told.resolved_at is None else "resolved",
                "text": told.text,
                "since": told.since,
                "resolved_at": told.resolved_at,
            }
            for told in message.news
        ],
    }
    return hook.url, dumps(body)


def _slack(hook: Webhook, message: Message, host: str, now: float) -> tuple[str, bytes]:
    text = text_of(message, host)
    # Its three control characters; anything else stands for itself.
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return hook.url, dumps({"text": text})


def _telegram(hook: Webhook, message: Message, host: str, now: float) -> tuple[str, bytes]:
    body = {"chat_id": hook.chat_id, "text": text_of(message, host)}
    return hook.url, dumps({**body, "link_preview_options": {"is_disabled": True}})


def _feishu(hook: Webhook, message: Message, host: str, now: float) -> tuple[str, bytes]:
    body: dict[str, Any] = {"msg_type": "text", "content": {"text": text_of(message, host)}}
    if hook.secret:
        # Seconds and secret are the key here, and what is signed is nothing.
        at = str(int(now))
        body = {"timestamp": at, "sign": _signature(f"{at}\n{hook.secret}", ""), **body}
    return hook.url, dumps(body)


def _dingtalk(hook: Webhook, message: Message, host: str, now: float) -> tuple[str, bytes]:
    body = {"msgtype": "text", "text": {"content": text_of(message, host)}}
    url = hook.url
    if hook.secret:
        at = str(int(now * 1000))
        sign = quote(_signature(hook.secret, f"{at}\n{hook.secret}"), safe="")
        url = f"{url}{'&' if '?' in url else '?'}timestamp={at}&sign={sign}"
    return url, dumps(body)


def _signature(key: str, text: str) -> str:
    return base64.b64encode(hmac.new(key.encode(), text.encode(), hashlib.sha256).digest()).decode()


_SHAPES: Mapping[str, Callable[[Webhook, Message, str, float], tuple[str, bytes]]] = {
    "generic": _generic,
    "slack": _slack,
    "telegram": _telegram,
    "feishu": _feishu,
    "dingtalk": _dingtalk,
}

# Some answer 200 to what they refuse, and say so in the body: where, and what is good.
_VERDICTS: Mapping[str, Sequence[tuple[str, object]]] = {
    "telegram": (("ok", True),),
    "feishu": (("code", 0), ("StatusCode", 0)),
    "dingtalk": (("errcode", 0),),
}


def refusal(hook: Webhook, reply: Reply) -> str:
    """Say why a message was not taken; empty when it was. Nothing of the body is repeated but a number."""
    if not 200 <= reply.status < 300:
        moved = "; redirects are not followed, put its new address into the configuration"
        return f"status {reply.status}" + (moved if 300 <= reply.status < 400 else "")
    verdicts = _VERDICTS.get(hook.shape)
    if verdicts is None:
        return ""
    try:
        said = loads(reply.body)
    except BadJson:
        return "its answer is not that of such a service"
    for field, good in verdicts:
        if isinstance(said, dict) and field in said:
            value = said[field]
            number = f" {field} {value}" if isinstance(value, int) else ""
            return "" if value == good else f"refused{number}"
    return "its answer is not that of such a service"


def retry_after(reply: Reply) -> float | None:
    """Return how many seconds the service wants to be left alone, if it said so."""
    text = reply.headers.get("retry-after", "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
