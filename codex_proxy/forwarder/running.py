"""The forwarder as a process: its loop, its signals, its end."""

import asyncio
import gc
import importlib
import logging
import resource
import signal
from collections.abc import Callable

from codex_proxy import logs
from codex_proxy.forwarder.service import Forwarder
from codex_proxy.forwarder.settings import Settings
from codex_proxy.tasks import Background

logger = logging.getLogger(__name__)


def run(settings: Settings, when_ready: Callable[[str], None], when_ending: Callable[[str], None]) -> int:
    """Forward until a signal ends it; return the exit code.

    Args:
        when_ready: Is told how we are once requests are taken.
        when_ending: Is told when no more are.
    """
    logs.setup("debug" if settings.debug else "info")
    # Two sockets for each stream.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_main(settings, when_ready, when_ending))
    except OSError as exc:
        logger.error(
            "not started: cannot listen on %s port %d: %s", settings.host, settings.port, exc.strerror or exc
        )
        return 1
    return 0


async def _main(
    settings: Settings, when_ready: Callable[[str], None], when_ending: Callable[[str], None]
) -> None:
    loop = asyncio.get_running_loop()
    ending, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if ending.is_set() else ending).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    background, forwarder = Background(), Forwarder(settings)
    try:
        await forwarder.start()
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        logger.info("listening url=http://%s:%d", host, forwarder.port)
        for upstream in settings.routes.default:
            logger.info("forwarding to=%s", upstream.url)
        for uid, upstreams in settings.routes.by_uid.items():
            for upstream in upstreams:
                logger.info("forwarding uid=%d to=%s", uid, upstream.url)
        if not settings.is_loopback and settings.key is None:
            logger.warning(
                "everybody who reaches this port can ask the server behind it, which sees this machine's address:"
                " a key of our own (FORWARD_KEY) or --host 127.0.0.1 would keep them out"
            )
        # What is there now stays; looking through it again and again costs.
        gc.collect()
        gc.freeze()
        when_ready(f"forwarding on port {forwarder.port}")
        await ending.wait()
        when_ending("ending")
        logger.info("ending")
        draining = background.spawn(forwarder.drain(settings.drain_timeout), name="drain")
        hurry = background.spawn(at_once.wait(), name="second signal")
        await asyncio.wait([draining, hurry], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await background.aclose()
        await forwarder.aclose()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory
