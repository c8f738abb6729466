"""`codex-proxy logout`: end a login at the issuer, and take its account out of the pool."""

import argparse
import asyncio

from codex_proxy.commands import accounts, options
from codex_proxy.commands.control import control
from codex_proxy.commands.terminal import confirm, say
from codex_proxy.config import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        "End an account's login at the issuer, so that its tokens are good for nobody, and take its file out of the"
        " auth-dir. To have the account again it has to log in."
    )
    parser.add_argument("alias", metavar="ALIAS", help="the account, by its name in `codex-proxy accounts`")
    options.add_yes(parser)


def run(args: argparse.Namespace) -> int:
    """Log an account out; return the exit code."""
    settings = options.load(args).settings
    asyncio.run(accounts.check_known(settings, [args.alias]))
    if not confirm(f"End the login of {args.alias} for good?", is_yes=args.yes):
        say("Nothing was done.")
        return 1
    return asyncio.run(_log_out(settings, args.alias))


async def _log_out(settings: Settings, alias: str) -> int:
    async with control(settings) as pool:
        return await accounts.act(pool, "logout", [alias])
