"""`codex-proxy why`: why a request went where it went."""

import argparse
import asyncio
import time

from codex_proxy.commands import options
from codex_proxy.commands.control import NoDaemon, daemon
from codex_proxy.commands.terminal import clock, columns, say, say_json, seconds_of
from codex_proxy.config import Settings
from codex_proxy.errors import ProxyError
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.records.offline import File, Unreadable
from codex_proxy.records.story import story


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Tell of a request which accounts could have served it, which one was chosen and why, and what became of it:"
        " one of the last ones, as the running daemon remembers it, or any that is on record."
    )
    parser.add_argument(
        "request_id", metavar="REQUEST_ID", type=_given, help="an answer's x-request-id, also in the log"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def _given(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("give a request id: an answer's x-request-id, also in the log")
    return text.strip()


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and print its answer; return the exit code."""
    settings = options.load(args).settings
    story = asyncio.run(_ask(settings, args.request_id))
    if args.json:
        say_json(dumps(story))
        return 0
    for line in render(story, time.time()):
        say(line)
    return 0


async def _ask(settings: Settings, request_id: str) -> JsonObject:
    try:
        async with daemon(settings) as running:
            return await running.why(request_id)
    except NoDaemon as exc:
        return _recorded(settings, request_id, exc)


def _recorded(settings: Settings, request_id: str, absent: NoDaemon) -> JsonObject:
    """Look for it in the records, because no daemon runs."""
    try:
        found = File(settings.data_dir).find(request_id)
    except Unreadable as exc:
        raise ProxyError(f"{absent.message} {exc.message[:1].upper()}{exc.message[1:]}") from exc
    if found is None:
        raise ProxyError(f"no request with the id {request_id[:100]!r} is on record, and no daemon runs")
    return story(found.trace)


def render(story: JsonObject, now: float) -> list[str]:
    """Return the story of a turn as lines for a person."""
    at = seconds_of(story["at"])
    when = "" if at is None else f" at {clock(at, now)}"
    kind = "streamed" if story["stream"] else "plain"
    lines = [
        f"{story['id']}: {story['route']} for {story['model'] or 'no model'}, {kind}, asked by {story['caller']}{when}",
        f"  {_outcome(story)}",
    ]
    if story["binding"]:
        lines.append(f"  its conversation was known by: {story['binding']}")
    if story["usage"] is not None:
        lines.append(f"  {_usage(story['usage'])}")
    for number, step in enumerate(story["steps"], 1):
        lines += ["", *_step(number, step)]
    if not story["steps"]:
        lines += ["", "No account was asked for."]
    return lines


def _outcome(story: JsonObject) -> str:
    words = {
        "completed": "answered",
        "incomplete": "answered up to a limit",
        "failed": "failed",
        "caller_gone": "its caller left",
        "open": "still running",
    }
    outcome = words.get(story["outcome"], story["outcome"])
    status = f", status {story['status']}" if story["status"] else ""
    error = f" ({story['error']})" if story["error"] else ""
    account = (
        f" by {story['account']}"
        if story["account"] and story["outcome"] in ("completed", "incomplete")
        else ""
    )
    return f"{outcome}{account}{status}{error} after {story['seconds']:g} s, {_count(story['attempts'], 'attempt')}"


def _usage(usage: JsonObject) -> str:
    source = ", estimated" if usage["source"] == "estimate" else ""
    return (
        f"{usage['input_tokens']} input tokens, {usage['cached_tokens']} of them cached;"
        f" {usage['output_tokens']} output tokens{source}"
    )


def _step(number: int, step: JsonObject) -> list[str]:
    decision = step["decision"]
    if decision is None:
        return [f"{number}. tried without a choice", *(_attempt(one) for one in step["attempts"])]
    if decision["account"]:
        lines = [f"{number}. {decision['account']}: {decision['rule']} ({decision['strategy']})"]
    else:
        lines = [f"{number}. nobody: {decision['rule']}"]
    lines += [_attempt(one) for one in step["attempts"]]
    if decision["candidates"]:
        more = decision["compared"] - len(decision["candidates"])
        lines.append(f"   compared {_count(decision['compared'], 'account')}, the best first:")
        rows = [
            (
                f"     {one['account']}",
                f"{one['score']:g}",
                ", ".join(f"{name} {value:g}" for name, value in one["parts"].items()),
            )
            for one in decision["candidates"]
        ]
        lines += columns(rows, ("<", ">", "<"))
        if more > 0:
            lines.append(f"     and {more} more")
    if decision["excluded_counts"]:
        total = sum(decision["excluded_counts"].values())
        counts = ", ".join(f"{count} {rule}" for rule, count in decision["excluded_counts"].items())
        lines.append(f"   left out {total}: {counts}")
        left_out = [
            (f"     {one['account']}", one["rule"] + (f": {one['evidence']}" if one["evidence"] else ""))
            for one in decision["excluded"]
        ]
        lines += columns(left_out, ("<", "<"))
    return lines


def _attempt(attempt: JsonObject) -> str:
    status = f", status {attempt['status']}" if attempt["status"] else ""
    return (
        f"   -> {attempt['account']}: {attempt['outcome']}{status}"
        f" ({attempt['after_seconds']:g} s after the request came, took {attempt['seconds']:g} s)"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
