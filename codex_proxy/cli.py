"""Arguments and subcommands.

`codex-proxy [-config FILE]` alone runs the daemon. A subcommand is one line in `COMMANDS`;
what it needs is imported only when it is called. Exit codes: 0, 1 at run time, 2 for usage
or configuration.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import yaml

from codex_proxy import __version__, config
from codex_proxy.commands import options
from codex_proxy.commands.terminal import printable
from codex_proxy.errors import ConfigError, ProxyError
from codex_proxy.server import keyfile

OK = 0
FAILED = 1
USAGE = 2


@dataclass(slots=True, frozen=True)
class Command:
    """One subcommand."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None
    """Called only when this subcommand is meant, so it may import what it likes."""
    takes_config: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = _parser(arguments).parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = getattr(parsed, "run", _run_daemon)
        code = run(parsed)
        sys.stdout.flush()
    except ConfigError as exc:
        _complain(exc.message)
        return USAGE
    except ProxyError as exc:
        _complain(exc.message)
        return FAILED
    except BrokenPipeError:
        # `codex-proxy check | head`: nobody reads on. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as exc:
        _complain(str(exc))
        return FAILED
    except KeyboardInterrupt:
        return FAILED
    return code


def _complain(message: str) -> None:
    for line in message.split("\n"):
        print(f"codex-proxy: {printable(line)}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints quote arguments as they can be shown."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="codex-proxy",
        # Written out, because nothing else says that the command may be left out.
        usage="codex-proxy [-h] [--version] [-config FILE] [COMMAND ...]",
        description="Serve your ChatGPT/Codex accounts through one address. Without a command: run the daemon.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"codex-proxy {__version__}")
    options.add_config(parser, is_top=True)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", prog=parser.prog)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.name, help=command.help, description=_sentence(command.help), allow_abbrev=False
        )
        sub.set_defaults(run=command.run)
        if command.takes_config:
            options.add_config(sub)
        if command.add_arguments is not None and command.name in arguments:
            command.add_arguments(sub)
    return parser


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _run_daemon(args: argparse.Namespace) -> int:
    loaded = options.load(args)
    code: int = importlib.import_module("codex_proxy.daemon").run(loaded)
    return code


def _check(args: argparse.Namespace) -> int:
    loaded = options.load(args)
    source = printable(str(loaded.path)) if loaded.path is not None else "no configuration file"
    print(f"# {source}: valid; these settings count")
    for name, value in config.masked(loaded.settings).items():
        text = yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, width=1000).rstrip("\n")
        first, newline, rest = text.partition("\n")
        print(f"{first}  # {loaded.origins.get(name, 'default')}{newline}{rest}")
    for warning in loaded.warnings:
        _complain(f"warning: {warning}")
    return OK


def _version(_: argparse.Namespace) -> int:
    print(f"codex-proxy {__version__}")
    return OK


def _key(args: argparse.Namespace) -> int:
    settings = options.load(args).settings
    key = keyfile.read_client_key(settings.data_dir)
    if key is None:
        _complain(
            f"there is no generated key in {settings.data_dir / keyfile.NAME}: the daemon makes one when it starts"
            " without api-keys on an address that other machines reach"
        )
        return FAILED
    print(key)
    if not keyfile.needs_key(settings):
        _complain(
            "note: this key does not count now: the configuration has api-keys, auth: none, or listens on loopback"
        )
    return OK


def _setup_token(args: argparse.Namespace) -> int:
    settings = options.load(args).settings
    if not keyfile.may_set_up(settings):
        _complain(
            "the page is opened with the admin-key"
            if settings.admin_key is not None
            else "the page is opened with any of the api-keys"
        )
        return FAILED
    token, path = keyfile.make_setup_token(settings.data_dir)
    print(token)
    _complain(f"good once, within a day, for the page at /ui; it is also in {path}")
    return OK


def _from_module(
    module: str,
) -> tuple[Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None]]:
    """Return `run` and `add_arguments` of *module*, imported when they are called."""

    def run(args: argparse.Namespace) -> int:
        code: int = importlib.import_module(module).run(args)
        return code

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        importlib.import_module(module).add_arguments(parser)

    return run, add_arguments


COMMANDS: list[Command] = [
    Command(
        "check", "validate the configuration and print the settings that count", _check, takes_config=True
    ),
    Command(
        "login",
        "log a ChatGPT account in, with a browser or a device code",
        *_from_module("codex_proxy.commands.login"),
        takes_config=True,
    ),
    Command(
        "import",
        "bring account files from elsewhere into the auth-dir",
        *_from_module("codex_proxy.commands.importing"),
        takes_config=True,
    ),
    Command(
        "accounts",
        "show the accounts; disable, enable, remove, refresh, reset, check or relogin one",
        *_from_module("codex_proxy.commands.accounts"),
        takes_config=True,
    ),
    Command(
        "logout",
        "end an account's login and take it out of the pool",
        *_from_module("codex_proxy.commands.logout"),
        takes_config=True,
    ),
    Command(
        "why",
        "tell why a request went to the account it went to",
        *_from_module("codex_proxy.commands.why"),
        takes_config=True,
    ),
    Command(
        "requests",
        "list what became of the last requests, also as JSON or CSV",
        *_from_module("codex_proxy.commands.requests"),
        takes_config=True,
    ),
    Command(
        "restart",
        "have a new process take over from the running daemon without dropping a stream",
        *_from_module("codex_proxy.commands.restart"),
        takes_config=True,
    ),
    Command(
        "top",
        "watch the running daemon and its accounts in a terminal",
        *_from_module("codex_proxy.commands.top"),
        takes_config=True,
    ),
    Command(
        "doctor",
        "look for what is wrong and say what to do",
        *_from_module("codex_proxy.commands.doctor"),
        takes_config=True,
    ),
    Command(
        "healthcheck",
        "ask the daemon whether it is well, for Docker and systemd",
        *_from_module("codex_proxy.commands.healthcheck"),
        takes_config=True,
    ),
    Command(
        "alert-test",
        "send a test message to the alert webhooks",
        *_from_module("codex_proxy.commands.alerttest"),
        takes_config=True,
    ),
    Command("key", "print the client key that the daemon generated", _key, takes_config=True),
    Command(
        "setup-token",
        "make a token that opens the page once, where no key was chosen",
        _setup_token,
        takes_config=True,
    ),
    Command(
        "simulate",
        "run a local Codex backend to try clients against",
        *_from_module("codex_proxy.simulator.cli"),
    ),
    Command(
        "demo", "show simulator and daemon at work, without an account", *_from_module("codex_proxy.demo")
    ),
    Command(
        "keys",
        "list the client keys of the ledger; create, rotate, limit or revoke one",
        *_from_module("codex_proxy.commands.keys"),
        takes_config=True,
    ),
    Command(
        "users",
        "list the users of the ledger and their balances; create, suspend, credit or adjust one",
        *_from_module("codex_proxy.commands.users"),
        takes_config=True,
    ),
    Command(
        "usage",
        "add up what was used by user, key, model or day, also as JSON or CSV",
        *_from_module("codex_proxy.commands.usage"),
        takes_config=True,
    ),
    Command(
        "prices",
        "list what models cost; set or end a price of your own, price usage again",
        *_from_module("codex_proxy.commands.prices"),
        takes_config=True,
    ),
    Command(
        "upstreams",
        "list the providers over HTTP beside the accounts, or check them",
        *_from_module("codex_proxy.commands.upstreams"),
        takes_config=True,
    ),
    Command(
        "ledger",
        "tell how the ledger does, or check that its sums agree",
        *_from_module("codex_proxy.commands.ledgers"),
        takes_config=True,
    ),
    Command(
        "forward",
        "pass requests on to a far server as they are, without accounts",
        *_from_module("codex_proxy.commands.forward"),
    ),
    Command("version", "print the version", _version),
]
