"""Arguments that many subcommands share. Imported by the command line itself: keep it light."""

import argparse
import os
from pathlib import Path

from codex_proxy import config


def add_config(parser: argparse.ArgumentParser, *, is_top: bool = False) -> None:
    """Let *parser* take `-config FILE`."""
    parser.add_argument(
        "-config",
        "--config",
        metavar="FILE",
        type=Path,
        # Below the top a default would undo a -config before the command.
        default=None if is_top else argparse.SUPPRESS,
        help="configuration file"
        + (" (default: ./config.yaml if there, else the defaults)" if is_top else ""),
    )


def load(args: argparse.Namespace) -> config.Loaded:
    """Read the settings that the arguments name."""
    return config.load(args.config, os.environ)


def add_yes(parser: argparse.ArgumentParser) -> None:
    """Let *parser* take the answer to its question."""
    parser.add_argument("--yes", action="store_true", help="do not ask whether that is meant")


def add_login(parser: argparse.ArgumentParser) -> None:
    """Let *parser* take how to log in."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--no-browser",
        action="store_true",
        help="print the address instead of opening a browser, and take what that browser ended at from stdin",
    )
    how.add_argument(
        "--device", action="store_true", help="log in with a code that is typed on another device"
    )
    parser.add_argument(
        "--callback-port",
        metavar="PORT",
        type=_port,
        action="append",
        default=[],
        help="port of this machine for the browser to come back to (1455, else 1457: the issuer knows no others)",
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65_535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: a number from 0 to 65535 would do")
    return int(text)
