"""`codex-proxy forward`: relay requests to a far server."""

import argparse
import os

from codex_proxy.forwarder import running, settings
from codex_proxy.supervisor import Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Pass requests below /v1 and /u1/v1 on to a far server as they are, each caller's own key included. It needs no"
        " account and no configuration file: what is not given here is read from the environment."
    )

    def add(flag: str, variable: str, text: str, **more: object) -> None:
        parser.add_argument(flag, help=f"{text} [{variable}]", **more)  # type: ignore[arg-type]  # as argparse takes them

    add(
        "--upstream", "UPSTREAM_SERVER_A", "the far server, with or without /v1; more of them share the callers",
        metavar="URL", action="append",
    )  # fmt: skip
    add(
        "--route", "UPSTREAM_ROUTES", "where requests below /u1/v1 go; others below /uN/v1 go where all do",
        metavar="1=URL", action="append",
    )  # fmt: skip
    add("--host", "FORWARD_HOST", "address to listen on (127.0.0.1: only this machine)", metavar="ADDRESS")
    add("--port", "PORT", "port to listen on (8000)", metavar="PORT")
    add("--timeout", "UPSTREAM_TIMEOUT_SEC", "how long either side may do nothing (300)", metavar="SECONDS")
    add(
        "--drain-timeout", "FORWARD_DRAIN_SEC", "how long requests have to end after SIGTERM (120)",
        metavar="SECONDS",
    )  # fmt: skip
    add(
        "--max-connections", "FORWARD_MAX_CONNECTIONS", "how many callers are let in at a time (5000)", metavar="N"
    )  # fmt: skip
    add("--rate-limit", "FORWARD_RATE_LIMIT", "requests a minute for each address (0: no limit)", metavar="N")
    add(
        "--trust", "FORWARD_TRUST", "a reverse proxy whose X-Forwarded-For is believed",
        metavar="NETWORK", action="append",
    )  # fmt: skip
    add(
        "--key-file", "FORWARD_KEY", "file with the key that callers show us in x-forward-key; none is made here",
        metavar="FILE",
    )  # fmt: skip
    add(
        "--admin-key-file", "FORWARD_ADMIN_KEY", "file with the key that opens /debug/info from elsewhere",
        metavar="FILE",
    )  # fmt: skip
    add("--debug", "DEBUG_LOG", "say more in the log; never what is in a request", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Forward until a signal ends it; return the exit code."""
    # Before anything is started: what is wrong with it is told as usage is.
    wanted = settings.load(vars(args), os.environ)
    supervisor = Supervisor(os.environ)
    return running.run(wanted, supervisor.ready, supervisor.stopping)
