"""A process that is to take over and does something else; run as a program, with what to do as its argument."""

import asyncio
import os
import signal
import sys

from codex_proxy import handover


async def succeed(what: str) -> int:
    predecessor = handover.predecessor(os.environ)
    assert predecessor is not None
    os.write(2, b"odd: began\n")
    if what == "ends early":
        os.write(2, b"odd: no use going on\n")
        return 3
    if what == "hangs early":
        await asyncio.sleep(60)
    await predecessor.wait_for_go()
    if what == "hangs late":
        await asyncio.sleep(60)
    if what == "is killed late":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(what)


if __name__ == "__main__":
    sys.exit(asyncio.run(succeed(sys.argv[1])))
