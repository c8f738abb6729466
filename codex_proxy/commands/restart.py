"""`codex-proxy restart`: a new process in place of the running one, and nobody notices."""

import argparse
import asyncio

from codex_proxy.commands import options
from codex_proxy.commands.control import daemon
from codex_proxy.commands.terminal import complain, say, say_json
from codex_proxy.config import Settings
from codex_proxy.protocol.wire import JsonObject, dumps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Have the running daemon start a new process, with the same command line, and give it its sockets: for a new"
        " version, or for settings that need a restart. Streams that run end in the old process, which they have up to"
        " drain-timeout for; no connection is refused meanwhile. If the new process does not come up, the old one"
        " goes on as before. Not possible where the daemon is process 1 of a container."
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask the daemon and tell what came of it; return the exit code."""
    settings = options.load(args).settings
    outcome = asyncio.run(_ask(settings))
    if args.json:
        say_json(dumps(outcome))
    elif outcome["success"]:
        say(f"{outcome['message']}.")
        say(f"It took {outcome['seconds']:g} s; newcomers waited {outcome['held_seconds']:g} s of them.")
    else:
        complain(f"not restarted, the daemon goes on as before: {outcome['message']}")
        if outcome["log"]:
            complain("the last that the new process said:", *(f"  {line}" for line in outcome["log"]))
    return 0 if outcome["success"] else 1


async def _ask(settings: Settings) -> JsonObject:
    async with daemon(settings) as running:
        return await running.restart()
