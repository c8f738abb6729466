"""The bench's arguments, and the run from beginning to end."""

import argparse
import io
import json
import pstats
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench.perf.contenders import AGAINST, ASKED_FOR, CONTENDERS, Contender, Place
from bench.perf.processes import Broken, Cores, Kit, Mock, stop_all
from bench.perf.report import render
from bench.perf.rows import (
    FULL,
    IN_QUICK,
    PROFILED,
    QUICK,
    ROWS,
    Bench,
    Size,
    Table,
    start_servers,
    write_scripts,
)
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator import SimAccount, Simulator
from codex_proxy.simulator.quota import quota_headers, usage_page


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    made = argparse.ArgumentParser(
        prog="make bench ARGS=...",
        description="Measure codex-proxy beside a byte forwarder and a minimal proxy in Go.",
    )
    names = ",".join(one.name for one in (*CONTENDERS, *ASKED_FOR))
    made.add_argument(
        "--quick", action="store_true", help="about a minute: less of everything, and no large rows"
    )
    made.add_argument("--only", metavar="ROWS", help=f"only these rows: {','.join(ROWS)}")
    made.add_argument("--contenders", metavar="NAMES", help=f"only these, or all that begin so: {names}")
    made.add_argument("--rounds", type=int, metavar="N", help="how often each is measured")
    made.add_argument("--accounts", type=int, default=3, metavar="N", help="accounts of the daemon (3)")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the daemon, not of the other checkout's",
    )
    made.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another checkout, measured beside this one"
    )
    made.add_argument("--merged", action="store_true", help="events written at once come as one HTTP chunk")
    made.add_argument(
        "--profile", action="store_true", help="tell instead where the time goes in what is written in Python"
    )
    made.add_argument(
        "--markdown", action="store_true", help="print the tables as docs/performance.md has them"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file, too")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; the exit code says whether everything was measured."""
    args = parser().parse_args(arguments)
    if sys.platform != "linux":
        sys.stderr.write("the bench reads CPU time and memory from /proc, which only Linux has\n")
        return 2
    # The same way out for all: what was started is stopped there.
    before = {
        number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        return _run(args)
    except Broken as exc:
        sys.stderr.write(f"\nthis run does not count: {exc}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        return 130
    finally:
        # Impatience must not leave half of them behind.
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        stop_all()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def choose(args: argparse.Namespace) -> tuple[list[str], list[Contender], Size]:
    """Return which rows and contenders are wanted, and how long each takes.

    Raises:
        Broken: If a name is none.
    """
    rows = list(IN_QUICK) if args.quick else list(ROWS)
    if args.only:
        rows = args.only.split(",")
        if unknown := [row for row in rows if row not in ROWS]:
            raise Broken(f"no such row: {', '.join(unknown)}")
    chosen = known = [*CONTENDERS, *(AGAINST if args.against else ())]
    if args.contenders:
        wanted = args.contenders.split(",")
        known = [*known, *ASKED_FOR]
        chosen = [one for one in known if one.name.startswith(tuple(wanted))]
        for want in wanted:
            if not any(one.name.startswith(want) for one in known):
                raise Broken(f"no such contender: {want}")
    size = PROFILED if args.profile else QUICK if args.quick else FULL
    if args.rounds:
        size = replace(size, rounds=args.rounds, paced_rounds=args.rounds)
    return rows, chosen, size


def _run(args: argparse.Namespace) -> int:
    rows, contenders, size = choose(args)
    settings = dict(one.partition("=")[::2] for one in args.set)
    kit = Kit.make()
    cores = Cores.choose()
    if kit.is_slow:
        _warn("GO IS NOT INSTALLED: the mock and the load generator are slow ones in Python, and will be the "
             "limit themselves. Compare nothing but CPU time, and trust little of it.")  # fmt: skip
    if not cores.proxy:
        _warn("ONLY ONE CORE: the proxies share it with the mock and the load generator.")
    _allow_files()
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="codex-proxy-bench-")))
        simulator = Simulator(args.accounts)
        plan = {
            "merged": args.merged,
            **answers_of(simulator.accounts[0]),
            "scripts": write_scripts(folder, size, rows),
        }
        mock = Mock(kit, cores, folder, plan)
        stack.callback(mock.process.stop)
        place = Place(folder, cores, mock.port, simulator, settings, args.against, args.profile)
        servers, failures = start_servers(stack, place, contenders)
        for name in dict.fromkeys(one.server for one in contenders):
            if name in failures:
                _warn(f"{name} does not start, so its lines are missing: {failures[name]}")
            elif name not in servers:
                _warn(f"{name} is not installed here, so its lines are missing.")
        contenders = [one for one in contenders if one.server in servers]
        bench = Bench(kit, place, mock, servers, contenders, size, _progress)
        for row in rows:
            if not sys.stderr.isatty():
                sys.stderr.write(f"{row}\n")
            ROWS[row].run(bench, row)
        _progress("")
        if args.profile:
            for name, file in place.profiles.items():
                servers[name].stop()
                sys.stdout.write(f"{name}\n{top_of(file)}\n")
        else:
            sys.stdout.write(render(bench.table, contenders, size, markdown=args.markdown))
            sys.stdout.write(f"\n{time.monotonic() - started:.0f} s; python {sys.version.split()[0]}\n")
    if args.json:
        args.json.write_bytes(
            dumps({row: {k: asdict(v) for k, v in own.items()} for row, own in bench.table.items()})
        )
    broken = failures_of(bench.table)
    sys.stderr.write("".join(f"\n{failure}\n" for failure in broken))
    return 1 if failures or broken else 0


def failures_of(table: Table) -> list[str]:
    """Return what went wrong; of the later ones of a contender, which are mostly the same, only the first line."""
    seen: set[str] = set()
    found: list[str] = []
    for row, own in table.items():
        for name, one in own.items():
            if one.failure is not None:
                found.append(
                    f"{name} in {row}: {one.failure.splitlines()[0] if name in seen else one.failure}"
                )
                seen.add(name)
    return found


def top_of(profile: Path, lines: int = 45) -> str:
    """Return the functions that took most of the time of a profile."""
    text = io.StringIO()
    pstats.Stats(str(profile), stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def _allow_files() -> None:
    """Let what we start open as many files as it may: a stream is two, and a shell's limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _warn(text: str) -> None:
    sys.stderr.write(f"\n*** {text}\n\n")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def answers_of(account: SimAccount) -> JsonObject:
    """Return how the mock answers as *account*: headers as the backend has them, and the pages a daemon asks for."""
    # In use, as windows nearly always are: those that nobody has begun are read more closely.
    account.use(primary=12.0, secondary=30.0)
    headers = {
        "Date": "Thu, 21 May 2026 04:39:43 GMT", "Content-Type": "text/event-stream; charset=utf-8", "Connection": "keep-alive",
        **quota_headers(account), "x-models-etag": account.etag(), "x-oai-request-id": "00000000-0000-4000-8000-000000000000",
        "x-content-type-options": "nosniff", "cf-cache-status": "DYNAMIC", "Server": "cloudflare", "CF-RAY": "0000000000000000-FRA",
    }  # fmt: skip
    head = "HTTP/1.1 200 OK\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    pages = {
        "/backend-api/codex/models": json.dumps({"models": account.model_list()}),
        "/backend-api/wham/usage": json.dumps(usage_page(account)),
    }
    return {"head": head, "pages": pages}
