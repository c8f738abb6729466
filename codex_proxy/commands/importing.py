"""`codex-proxy import`: bring logins that lie elsewhere into the auth-dir."""

import argparse
import asyncio
import time
from collections import Counter
from pathlib import Path

from codex_proxy.accounts.importing import OUTCOMES, Brought, Outcome, bring, read
from codex_proxy.commands import options
from codex_proxy.commands.control import take_up
from codex_proxy.commands.terminal import complain, say, wrapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Copy accounts into the auth-dir: a Codex CLI's auth.json or its whole folder, files of the Go daemon, a"
        " folder of such, a JSON list, or a file with one account on each line. What is there is only read."
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="file or folder")


def run(args: argparse.Namespace) -> int:
    """Import; return the exit code: 1 when anything was refused."""
    settings = options.load(args).settings
    counts: Counter[Outcome] = Counter()
    shared: list[str] = []
    for brought in bring(read(path.expanduser() for path in args.paths), settings.auth_dir, now=time.time()):
        counts[brought.outcome] += 1
        _tell(brought)
        if brought.is_of_the_cli and brought.outcome in ("imported", "updated"):
            shared.append(brought.item.place)
    say(
        f"{sum(counts.values())} found: "
        + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
        + "."
    )
    if shared:
        complain(*_warning(shared))
    if taken := counts["imported"] + counts["updated"]:
        say(asyncio.run(take_up(settings, "it" if taken == 1 else "them")))
    return 1 if counts["refused"] else 0


def _tell(brought: Brought) -> None:
    place = brought.item.place
    if brought.credential is None:
        complain(f"{place}: refused: {brought.reason}")
        return
    name = brought.credential.alias or brought.credential.default_alias
    notes = f" ({'; '.join(brought.notes)})" if brought.notes else ""
    say(f"{place}: {brought.outcome}: {name}{notes}")


def _warning(places: list[str]) -> list[str]:
    names = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
    # `complain` puts the command's name before each line.
    return wrapped(
        f"warning: {names} may still be in use by a Codex CLI. A refresh token works once, so when the CLI and this"
        " pool share a login, one of them will be logged out. To avoid that, log the same account in once more with"
        " `codex-proxy login`: the pool then has a login of its own, and the CLI keeps this one.",
        78 - len("codex-proxy: "),
    )
