"""Messages on their way: a short queue for each webhook, tried again until they are taken.

Nobody waits for a webhook: one that hangs holds up its own messages and nothing else.
"""

import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from codex_proxy.alerts.episodes import time_of, told_of
from codex_proxy.alerts.shapes import Message, refusal, render, retry_after
from codex_proxy.clock import Clock
from codex_proxy.config import Live, Webhook, mask_url
from codex_proxy.net import NetError, Reply
from codex_proxy.tasks import Background

logger = logging.getLogger(__name__)

SEND_SECONDS = 10.0
"""How long one try may take."""

MAX_WAITING = 50
"""Of one webhook; past it the oldest message goes."""

# Between tries; doubled each time.
_FIRST_PAUSE = 5.0
_LONGEST_PAUSE = 600.0

# A service may want to be left alone for so long; by the end of a longer time the message would be too old.
_LONGEST_ASKED_FOR = 3_600.0

# What happened a day ago is no alert any more.
_MAX_AGE = 86_400.0


class Fetch(Protocol):
    """What carries a message: `Outbound.fetch`."""

    def __call__(
        self, method: str, url: str, *, headers: Mapping[str, str], body: bytes | None, timeout: float
    ) -> Awaitable[Reply]: ...


async def send(
    fetch: Fetch, hook: Webhook, message: Message, *, host: str, now: float
) -> tuple[str, float | None]:
    """Try once; return why it was not taken ('' if it was), and how long the service wants to be left alone."""
    url, body = render(hook, message, host, now)
    headers = {"content-type": "application/json", "accept": "application/json", "user-agent": "codex-proxy"}
    try:
        reply = await fetch("POST", url, headers=headers, body=body, timeout=SEND_SECONDS)
    except NetError as exc:
        return str(exc), None
    return refusal(hook, reply), retry_after(reply)


class Outbox:
    """Sends messages in the background.

    Args:
        may_act: Whether this process sends: of two daemons on one data-dir one does.
        on_change: Called when the queues are others than before, so that they can be written down.
    """

    def __init__(
        self,
        fetch: Fetch,
        *,
        live: Live,
        clock: Clock,
        background: Background,
        host: str,
        may_act: Callable[[], bool],
        on_change: Callable[[], Awaitable[None]],
        rng: random.Random | None = None,
    ) -> None:
        self._fetch = fetch
        self._live = live
        self._clock = clock
        self._background = background
        self._host = host
        self._may_act = may_act
        self._on_change = on_change
        self._rng = rng if rng is not None else random.Random()
        self._queues: dict[str, deque[Message]] = {}
        """By the name of the webhook."""
        self._sending: set[str] = set()
        self.results: Counter[tuple[str, str]] = Counter()
        """How many messages, by webhook and what came of them."""

    def put(self, message: Message) -> None:
        """Put a message into every webhook's queue; `start` sends it."""
        for hook in self._live.current.alert_webhooks:
            queue = self._queues.setdefault(hook.name, deque())
            if len(queue) >= MAX_WAITING:
                queue.popleft()
                self.results[hook.name, "dropped"] += 1
            queue.append(message)

    def start(self) -> None:
        """Begin to send what waits; webhooks that are gone from the configuration get nothing more."""
        hooks = {hook.name for hook in self._live.current.alert_webhooks}
        for name in [name for name in self._queues if name not in hooks or not self._queues[name]]:
            del self._queues[name]
        for name in self._queues.keys() - self._sending:
            self._sending.add(name)
            _ = self._background.spawn(self._send_all(name), name=f"alerts:{name}")

    async def _send_all(self, name: str) -> None:
        """Send what waits for one webhook, in order, until nothing does."""
        failures = 0
        try:
            while self._may_act() and (queue := self._queues.get(name)):
                hook = next((one for one in self._live.current.alert_webhooks if one.name == name), None)
                if hook is None:
                    return
                message = queue[0]
                reason, pause = "too old", None
                if self._clock.now() - message.at <= _MAX_AGE:
                    reason, pause = await send(
                        self._fetch, hook, message, host=self._host, now=self._clock.now()
                    )
                    if reason:
                        failures += 1
                        self._failed(hook, reason, failures)
                        await self._clock.sleep(
                            self._pause(failures) if pause is None else min(pause, _LONGEST_ASKED_FOR)
                        )
                        continue
                failures = 0
                self.results[name, "expired" if reason else "sent"] += 1
                if queue and queue[0] is message:
                    queue.popleft()
                await self._on_change()
        finally:
            self._sending.discard(name)

    def _failed(self, hook: Webhook, reason: str, failures: int) -> None:
        self.results[hook.name, "failed"] += 1
        # Once, not with every try.
        logger.log(
            logging.WARNING if failures == 1 else logging.DEBUG,
            "alert not delivered webhook=%s to=%s reason=%s tries=%d",
            hook.name, mask_url(hook.url), reason, failures,
        )  # fmt: skip

    def _pause(self, failures: int) -> float:
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(failures - 1, 10))
        return longest * (0.5 + self._rng.random() / 2)

    # -- over a restart -------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        """Return what waits."""
        return {
            name: [
                {
                    "at": message.at,
                    "news": [
                        {"name": t.name, "text": t.text, "since": t.since, "resolved_at": t.resolved_at}
                        for t in message.news
                    ],
                }
                for message in queue
            ]
            for name, queue in self._queues.items()
            if queue
        }

    def restore(self, said: object) -> None:
        """Take back what `dump` returned; whatever is wrong in it is left out."""
        for name, entries in said.items() if isinstance(said, dict) else ():
            messages = [_message(entry) for entry in entries] if isinstance(entries, list) else []
            self._queues[str(name)] = deque([m for m in messages if m is not None][-MAX_WAITING:])


def _message(entry: object) -> Message | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("news"), list):
        return None
    news = tuple([told for one in entry["news"] if (told := told_of(one)) is not None])
    at = time_of(entry.get("at"))
    return Message(at, news) if news and at is not None else None
