"""`codex-proxy healthcheck`: is the daemon there, in one exit code."""

import argparse
import http.client
import json
import re

from codex_proxy.commands import options
from codex_proxy.commands.terminal import complain, say
from codex_proxy.config import Settings

# Docker gives up after 30 s by itself, and a daemon that is well answers in milliseconds.
_SECONDS = 5.0

# Beyond some years a socket cannot be told.
_MOST_SECONDS = 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Ask the daemon at the address that `listen` names whether it is alive; exit code 1 when it is not. No key is"
        " needed, and the backend is not asked."
    )
    parser.add_argument("--ready", action="store_true", help="also want an account that can serve")
    parser.add_argument("--url", metavar="URL", help="ask there instead, for example http://127.0.0.1:8080")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=float, default=_SECONDS, help=f"how long to wait ({_SECONDS:g})"
    )


def run(args: argparse.Namespace) -> int:
    """Ask, print the answer in a line, and return the exit code."""
    host, port = _of_url(args.url) if args.url else _of_settings(options.load(args).settings)
    path = "/readyz" if args.ready else "/livez"
    if not host:
        return 2
    connection = http.client.HTTPConnection(host, port, timeout=min(max(0.1, args.timeout), _MOST_SECONDS))
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        said = answer.read(10_000)
    except (OSError, http.client.HTTPException, UnicodeError) as exc:
        complain(f"no answer from {host} port {port}: {str(exc) or type(exc).__name__}")
        return 1
    finally:
        connection.close()
    status = _status(said)
    if answer.status != 200 or not status:
        complain(f"{path} answered {answer.status}: {status or 'another program answers there'}")
        return 1
    say(status)
    return 0


def _of_settings(settings: Settings) -> tuple[str, int]:
    """Return where the daemon can be asked from this machine; no host where nobody can know."""
    if settings.listen_port == 0:
        complain(
            "listen has port 0, so only the daemon's log knows the port: name it with --url, or set a port"
        )
        return "", 0
    host = settings.listen_host
    return {None: "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(
        host, host or ""
    ), settings.listen_port


def _of_url(url: str) -> tuple[str, int]:
    scheme, mark, rest = url.partition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if (
        scheme != "http"
        or not mark
        or not host
        or not re.fullmatch(r"[0-9]{1,5}", port)
        or int(port) > 65_535
    ):
        complain("--url must be http://HOST:PORT")
        return "", 0
    return host.removeprefix("[").removesuffix("]"), int(port)


def _status(said: bytes) -> str:
    """Return what our own answer says; empty for one that is not ours."""
    try:
        return str(json.loads(said)["status"])[:100]
    except (ValueError, KeyError, TypeError):
        return ""
