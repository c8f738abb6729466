"""What an open page costs the daemon: the CPU time of 5,000 requests with and without, ten times in turn.

Each of the ten is made of short stretches with and without, one after the other: what a virtual machine's processor
does meanwhile changes over seconds, by more than what is measured. The page is played by what it keeps open: one live stream on the screen that is told most (each finished
request), read as fast as a browser reads it.
"""

import argparse
import contextlib
import http.client
import json
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.perf.cli import answers_of
from bench.perf.contenders import CONTENDERS, KEY, Place
from bench.perf.processes import Broken, Cores, Kit, Mock, stop_all
from bench.perf.rows import QUICK, Bench, start_servers, write_scripts
from codex_proxy.simulator import Simulator

_REQUESTS = 5_000
_STRETCHES = 8
_CONCURRENCY = 32


def main() -> int:
    """Run and print; the exit code says whether an open page costs less than it may."""
    parser = argparse.ArgumentParser(prog="make bench-page", description=__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="how often (10)")
    parser.add_argument("--topic", default="requests", help="the screen that is open (requests)")
    parser.add_argument("--most", type=float, default=5.0, help="what it may cost, in percent (5)")
    args = parser.parse_args()
    try:
        return _run(args)
    except Broken as exc:
        sys.stderr.write(f"\nthis run does not count: {exc}\n")
        return 1
    finally:
        stop_all()


def _run(args: argparse.Namespace) -> int:
    kit, cores = Kit.make(), Cores.choose()
    contender = next(one for one in CONTENDERS if one.name == "ours-chat")
    ratios: list[float] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="codex-proxy-bench-")))
        simulator = Simulator(3)
        plan = {
            "merged": False,
            **answers_of(simulator.accounts[0]),
            "scripts": write_scripts(folder, QUICK, ["small"]),
        }
        mock = Mock(kit, cores, folder, plan)
        stack.callback(mock.process.stop)
        place = Place(folder, cores, mock.port, simulator)
        servers, failures = start_servers(stack, place, [contender])
        if failures:
            raise Broken(str(failures))
        bench = Bench(kit, place, mock, servers, [contender], QUICK, lambda _: None)
        port = servers["ours"].port

        def cost() -> tuple[float, int]:
            job = bench.job(
                contender,
                "small",
                mode="closed",
                concurrency=_CONCURRENCY,
                at_least=_REQUESTS // _STRETCHES,
                seconds=0.2,
            )
            report = bench.run(job)
            return report["usage"]["proxy"]["cpu_ns"] / 1e3, report["requests"]

        cost()
        for number in range(args.pairs):
            sums = {False: [0.0, 0], True: [0.0, 0]}
            told = [0, 0]
            for stretch in range(2 * _STRETCHES):
                # With, without, without, with: what drifts favours neither.
                is_open = (stretch + stretch // 2 + number) % 2 == 0
                if is_open:
                    with _open_page(port, args.topic) as page:
                        cpu, count = cost()
                    told[0] += page.count
                    told[1] += page.size
                else:
                    cpu, count = cost()
                sums[is_open][0] += cpu
                sums[is_open][1] += count
            without, with_page = (sums[is_open][0] / sums[is_open][1] for is_open in (False, True))
            ratios.append(with_page / without)
            sys.stdout.write(
                f"{number + 1:3d}  without {without:7.1f} us  with {with_page:7.1f} us  {100 * (ratios[-1] - 1):+5.1f} %"
                f"  ({sums[True][1]} requests; the page was told {told[0]} things, {told[1] / 1024:.0f} KB)\n"
            )
            sys.stdout.flush()
    more = 100 * (statistics.median(ratios) - 1)
    sys.stdout.write(f"an open page costs {more:+.1f} % (median of {args.pairs}; at most {args.most:g})\n")
    return 0 if more < args.most else 1


class _Page:
    """What a page hears."""

    def __init__(self) -> None:
        self.count = 0
        self.size = 0


@contextlib.contextmanager
def _open_page(port: int, topic: str) -> Iterator[_Page]:
    """Log in and keep a live stream open."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    origin = {"Content-Type": "application/json"}
    connection.request("POST", "/ui/api/session", json.dumps({"key": KEY}), origin)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise Broken(f"the page does not open: {answer.status} {body[:200]!r}")
    cookie = (answer.getheader("Set-Cookie") or "").partition(";")[0]
    connection.request("GET", f"/ui/api/live?topic={topic}", headers={"Cookie": cookie})
    stream = connection.getresponse()
    if stream.status != 200:
        raise Broken(f"the page shows nothing: {stream.status}")
    page, is_over = _Page(), threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException, AttributeError):
            while not is_over.is_set() and (line := stream.readline()):
                page.count += line.startswith(b"event:")
                page.size += len(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield page
    finally:
        is_over.set()
        reader.join(5.0)
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
