"""`codex-proxy alert-test`: send a test message to every webhook, and say what came of it."""

import argparse
import asyncio
import socket
import time

from codex_proxy.alerts.episodes import Told
from codex_proxy.alerts.outbox import send
from codex_proxy.alerts.shapes import TEST, Message
from codex_proxy.commands import options
from codex_proxy.commands.terminal import complain, say
from codex_proxy.config import Live, Settings, Webhook, mask_url
from codex_proxy.net import Outbound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Send a test message to each of alert-webhooks. No daemon needs to run; exit code 1 when one of"
        " them did not take it."
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these webhooks")


def run(args: argparse.Namespace) -> int:
    """Send; return the exit code."""
    settings = options.load(args).settings
    hooks = [hook for hook in settings.alert_webhooks if not args.names or hook.name in args.names]
    unknown = [name for name in args.names if all(name != hook.name for hook in settings.alert_webhooks)]
    if unknown or not hooks:
        known = ", ".join(hook.name for hook in settings.alert_webhooks)
        complain(
            f"no webhook is called {unknown[0]!r}; there is {known}"
            if unknown and known
            else "there is no webhook: set alert-webhooks in the configuration"
        )
        return 1
    results = asyncio.run(_send_all(settings, hooks))
    for hook, reason in zip(hooks, results, strict=True):
        say(
            f"{hook.name} ({hook.shape}, {mask_url(hook.url)}): {f'not sent: {reason}' if reason else 'sent'}"
        )
    return 1 if any(results) else 0


async def _send_all(settings: Settings, hooks: list[Webhook]) -> list[str]:
    outbound, host, now = Outbound(Live(settings)), socket.gethostname(), time.time()
    told = Told(TEST, "This is a test: alerts reach you here.", now)
    try:
        tries = [send(outbound.fetch, hook, Message(now, (told,)), host=host, now=now) for hook in hooks]
        return [reason for reason, _ in await asyncio.gather(*tries)]
    finally:
        await outbound.aclose()
