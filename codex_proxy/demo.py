"""The main job in one command: a simulated backend, the daemon in front of it, a request in each dialect.

Everything is real but the backend: account files are written, loaded and used, the requests
go over sockets in the shapes that the SDKs send, and the answers are printed as they come. Nothing leaves this machine and no quota is used.
"""

import argparse
import asyncio
import logging
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import aiohttp

from codex_proxy import config, logs
from codex_proxy.daemon import Daemon
from codex_proxy.protocol.sse import Parser
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator import Simulator

MODEL = "gpt-5.5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's arguments."""
    parser.add_argument("--once", action="store_true", help="end after the requests")
    parser.add_argument("--accounts", type=int, default=3, metavar="N", help="how many accounts (3)")


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code says whether all requests were answered."""
    logs.setup("warn")
    return asyncio.run(_demo(once=args.once, accounts=max(1, args.accounts)))


async def _demo(*, once: bool, accounts: int) -> int:
    ending = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    with tempfile.TemporaryDirectory(prefix="codex-proxy-demo-") as folder:
        auths = Path(folder, "auths")
        async with Simulator(accounts=accounts) as simulator:
            simulator.write_auth_files(auths)
            environ = {
                "CODEX_PROXY_LISTEN": "127.0.0.1:0",
                "CODEX_PROXY_AUTH_DIR": str(auths),
                "CODEX_PROXY_DATA_DIR": str(Path(folder, "data")),
                "CODEX_PROXY_BASE_URL": simulator.base_url,
                "CODEX_PROXY_OAUTH_ISSUER": simulator.issuer,
            }
            loaded = _settings(folder, environ)
            daemon = Daemon(loaded, environ=environ)
            await daemon.start()
            try:
                print(f"simulated backend  {simulator.url}  ({accounts} accounts, no quota is used)")
                print(f"codex-proxy        {daemon.url}/v1")
                answered = await _ask(daemon.url)
                _explain(daemon.url, simulator.url)
                if not once:
                    print("\nUp until Ctrl-C.", flush=True)
                    await ending.wait()
            finally:
                # The people at the terminal should not wait for a drain of nothing.
                logging.getLogger("codex_proxy").setLevel(logging.ERROR)
                await daemon.stop(ending)
    return 0 if answered else 1


def _settings(folder: str, environ: dict[str, str]) -> config.Loaded:
    """Read settings from an empty file: a config.yaml lying here is meant for the daemon, not for this."""
    own = Path(folder, "config.yaml")
    own.touch()
    return config.load(own, environ)


async def _ask(url: str) -> bool:
    """Ask in every dialect, print the answers; True when all were whole."""
    headers = {"Authorization": "Bearer not-needed-on-loopback", "User-Agent": "codex-proxy demo"}
    async with aiohttp.ClientSession(headers=headers) as session:
        answered = [
            await _ask_streaming(session, url),
            await _ask_plainly(
                session,
                "plain",
                f"{url}/v1/responses",
                {"model": f"{MODEL}-high", "input": "And once more, all at once."},
                lambda answer: answer["output"][-1]["content"][0]["text"],
            ),
            await _ask_plainly(
                session,
                "Chat Completions, as OpenAI SDKs ask",
                f"{url}/v1/chat/completions",
                {"model": MODEL, "messages": [{"role": "user", "content": "Hello from Chat."}]},
                lambda answer: answer["choices"][0]["message"]["content"],
            ),
            await _ask_plainly(
                session,
                "Messages, as Claude Code and Claude SDKs ask",
                f"{url}/v1/messages",
                {
                    "model": "claude-opus-4-8",
                    "max_tokens": 1000,
                    "messages": [{"role": "user", "content": "Hello from Claude Code."}],
                },
                lambda answer: answer["content"][0]["text"],
            ),
        ]
    return all(answered)


async def _ask_streaming(session: aiohttp.ClientSession, url: str) -> bool:
    body = {"model": MODEL, "input": "Say hello from the demo.", "stream": True}
    print(f"\nstreaming: POST {url}/v1/responses {dumps(body).decode()}")
    text, last = "", ""
    async with session.post(f"{url}/v1/responses", json=body) as response:
        parser = Parser()
        async for chunk in response.content.iter_any():
            for event in parser.feed(chunk):
                last = event.type
                if event.type == "response.output_text.delta":
                    text += event.json["delta"]
        print(f"   HTTP {response.status}, last event {last}")
        print(f"   {text}")
    return response.status == 200 and last == "response.completed" and bool(text)


async def _ask_plainly(
    session: aiohttp.ClientSession,
    title: str,
    url: str,
    body: JsonObject,
    text_of: Callable[[JsonObject], str],
) -> bool:
    print(f"\n{title}: POST {url} {dumps(body).decode()}")
    async with session.post(url, json=body) as response:
        answer = await response.json()
        print(f"   HTTP {response.status}, model {answer.get('model')}")
        text = text_of(answer) if response.status == 200 else ""
        print(f"   {text}")
        print(f"   usage {dumps(answer.get('usage')).decode()}")
    return bool(text)


def _explain(url: str, simulator: str) -> None:
    print(f"""
Look at the page: {url}/ui

Go on with:
  curl -N {url}/v1/responses -H 'Content-Type: application/json' \\
       -d '{{"model":"{MODEL}","input":"sim:long 40","stream":true}}'
  ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN=any claude
  curl {url}/v1/models
  curl {url}/stats
  curl -X POST {url}/check-quota
  curl {simulator}/_sim            # what the simulated backend can be made to do

With your own accounts: put their files into auths/ and run `make run`.""")
