"""The daemon on a wall clock that a test can put forward: `python -m tests.soak.daemon CONFIG OFFSET`.

OFFSET is a file of eight bytes, the seconds to add to the machine's clock, as a little-endian double.
Cooldowns, resets and tokens follow the wall clock; deadlines of a request do not.
"""

import asyncio
import mmap
import struct
import sys
import time
from pathlib import Path

from codex_proxy import config, logs
from codex_proxy.clock import SystemClock
from codex_proxy.daemon import Daemon


class ShiftedClock(SystemClock):
    """The machine's clocks, the wall clock plus what the test says."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._shared = mmap.mmap(opened.fileno(), 8, access=mmap.ACCESS_READ)

    def now(self) -> float:
        return time.time() + float(struct.unpack("<d", self._shared[:8])[0])


def main() -> None:
    loaded = config.load(Path(sys.argv[1]), {})
    logs.setup(loaded.settings.log_level)

    async def serve() -> None:
        await Daemon(loaded, environ={}, clock=ShiftedClock(Path(sys.argv[2]))).run_until_signalled()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
