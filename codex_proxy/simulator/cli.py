"""`codex-proxy simulate`: the simulator on the command line."""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from codex_proxy.simulator.issuer import TEN_DAYS
from codex_proxy.simulator.server import Simulator


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the simulator."""
    parser.description = (
        "Play the Codex backend and its OAuth issuer locally, to try clients without spending quota."
    )
    parser.add_argument(
        "--accounts", type=_count, default=3, metavar="N", help="how many accounts (default 3)"
    )
    parser.add_argument("--auth-dir", type=Path, metavar="DIR", help="write ready account files there")
    parser.add_argument(
        "--shape", choices=("flat", "codex"), default="flat", help="shape of the account files"
    )
    parser.add_argument("--plan", default="plus", help="plan of the accounts (default plus)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8899, help="port to listen on; 0 picks one (default 8899)"
    )
    parser.add_argument(
        "--lifetime",
        type=float,
        default=TEN_DAYS,
        metavar="SECONDS",
        help="life of access tokens (default 10 days)",
    )
    parser.add_argument(
        "--quota-tokens",
        type=float,
        default=2_000_000,
        metavar="N",
        help="tokens that fill the 5-hour window; 0 never fills (default 2000000)",
    )
    parser.add_argument(
        "--wire",
        choices=("strict", "any"),
        default="strict",
        help="refuse the wrong wire shape of a model, or not",
    )
    parser.add_argument(
        "--lenient", action="store_true", help="accept requests that the live backend would refuse"
    )
    parser.add_argument(
        "--latency", type=float, default=0.0, metavar="SECONDS", help="wait before each answer (default 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Run until SIGINT or SIGTERM; return the exit code."""
    sim = Simulator(
        args.accounts,
        host=args.host,
        port=args.port,
        strict=not args.lenient,
        plan=args.plan,
        lifetime=args.lifetime,
        quota_tokens=args.quota_tokens,
        latency=args.latency,
    )
    sim.wire = args.wire
    return asyncio.run(_serve(sim, args.auth_dir, args.shape))


async def _serve(sim: Simulator, auth_dir: Path | None, shape: str) -> int:
    try:
        await sim.start()
    except OSError as exc:
        sys.stderr.write(f"cannot listen on {sim.host}:{sim.port}: {exc.strerror or exc}\n")
        return 1
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        if auth_dir is not None:
            try:
                sim.write_auth_files(auth_dir, "codex" if shape == "codex" else "flat")
            except OSError as exc:
                sys.stderr.write(f"cannot write account files to {auth_dir}: {exc.strerror or exc}\n")
                return 1
        sys.stdout.write(_greeting(sim, auth_dir))
        sys.stdout.flush()
        await stop.wait()
    finally:
        await sim.aclose()
    return 0


def _greeting(sim: Simulator, auth_dir: Path | None) -> str:
    folder = auth_dir if auth_dir is not None else "(none written; see --auth-dir)"
    return f"""The simulated Codex backend listens on {sim.url} with {len(sim.accounts)} accounts.

Point the proxy at it with these lines in its config.yaml:

base-url: {sim.base_url}
oauth-issuer: {sim.issuer}
auth-dir: {folder}

Try:

  curl {sim.url}/_sim                       everything that can be set
  curl {sim.url}/_sim/accounts              the accounts and their states
  curl {sim.url}/_sim/accounts/a1 -d '{{"state":"usage_limit","resets_in":60}}'
  curl {sim.url}/_sim/requests?limit=1      what the backend received

Ctrl-C ends it.
"""


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number
