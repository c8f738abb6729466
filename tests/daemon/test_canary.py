"""Nothing secret gets out: recognisable accounts, keys and words, every kind of failure, then a search."""

import asyncio
import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codex_proxy import logs
from codex_proxy.simulator import Script, SimAccount
from tests.harness import CODEX_HEADERS, STANDARD, Stand, standing

CLIENT_KEY = "canary-client-key-0123456789"
OTHER_KEY = "canary-stranger-key-987654"
PROMPT = "CanaryPromptWordsNobodyLogs"
ANSWER = "CanaryAnswerWordsNobodyLogs"
PROXY_PASSWORD = "canary-proxy-password"

KEYED = {"Authorization": f"Bearer {CLIENT_KEY}"}


class Ears:
    """All that anyone could read: answers, log lines."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.heard: dict[str, str] = {}
        self.statuses: dict[str, int] = {}

    async def ask(self, name: str, method: str, path: str, **options: Any) -> None:
        async with self._session.request(method, path, **options) as answer:
            text = (await answer.read()).decode("utf-8", "replace")
            self.statuses[name] = answer.status
            heads = "\n".join(f"{key}: {value}" for key, value in answer.headers.items())
            self.heard[name] = f"{heads}\n\n{text}"

    async def turn(
        self, name: str, *, codex: bool = False, path: str = "/v1/responses", **fields: object
    ) -> None:
        headers = {**KEYED, **(CODEX_HEADERS if codex else {})}
        body = {"model": STANDARD, "input": PROMPT, "stream": True, **fields}
        await self.ask(name, "POST", path, json=body, headers=headers)


class Secrets:
    """What must be nowhere, by the name under which a finding is reported."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {
            "client key": CLIENT_KEY,
            "a stranger's key": OTHER_KEY,
            "proxy password": PROXY_PASSWORD,
        }

    def add(self, account: SimAccount) -> None:
        """Remember what *account* has now; what it had before stays secret."""
        serial = len(self.texts)
        tokens = account.tokens
        for kind, token in (("access", tokens.access), ("refresh", tokens.refresh), ("id", tokens.id_token)):
            # The parts of a JWT that say something, not the header that all of them share.
            parts = token.split(".")[1:] if token.startswith("eyJ") else [token]
            for i, part in enumerate(parts):
                self.texts[f"{kind} token {serial}.{i} of {account.name}"] = part
        self.texts[f"e-mail of {account.name}"] = account.email
        self.texts[f"e-mail's name of {account.name}"] = account.email.partition("@")[0]

    def in_text(self, text: str) -> list[str]:
        """Return the names of what is in *text*."""
        lowered = text.lower()
        return [name for name, secret in self.texts.items() if secret.lower() in lowered]


def echoes(account: SimAccount) -> Iterable[tuple[str, str, dict[str, Any]]]:
    """Return states in which the backend repeats what it should not, as a gateway's debug page does."""
    tokens = account.tokens
    words = (
        f"Bad request of {account.email} with Authorization: Bearer {tokens.access} and {tokens.refresh} "
        f"({tokens.id_token})"
    )
    error = {"message": words, "type": "invalid_request_error", "param": None, "code": "invalid_value"}
    yield "echo 400", "bad_request", {"body": {"error": error}}
    yield "echo 422", "bad_request", {"body": {"detail": words}, "status": 422}
    fields = {**error, "message": "no", "param": tokens.access, "code": account.email, "type": tokens.refresh}
    yield "echo in fields", "bad_request", {"body": {"error": fields}}
    yield "echo in a bare code", "bad_request", {"body": {"error": tokens.refresh}}
    yield "echo 500", "server_error", {"status": 500, "body": {"error": error}}
    yield "echo page", "server_error", {"status": 502, "body": f"<html>{words}</html>"}
    yield "echo 403", "forbidden", {"detail": words}
    yield "echo 429", "rate_limit", {"message": words, "retry_after": 0}
    yield "echo in stream", "failed", {"code": "invalid_prompt", "message": words}
    yield "echo in stream, server", "failed", {"code": "server_error", "message": words}
    yield "echo late", "failed", {"code": "server_error", "message": words, "after": 3}
    yield "echo late, the caller's", "failed", {"code": "invalid_prompt", "message": words, "after": 3}
    yield "echo as error", "failed", {"code": "invalid_prompt", "message": words, "how": "error"}


PLAIN: list[tuple[str, str, dict[str, Any]]] = [
    ("usage limit", "usage_limit", {"resets_in": 3600}),
    ("rate limit", "rate_limit", {"retry_after": 0}),
    ("overloaded", "overloaded", {}),
    ("overloaded in stream", "overloaded_in_stream", {}),
    ("context", "context_length", {}),
    ("incomplete", "incomplete", {}),
    ("cut", "cut", {}),
    ("refused token", "unauthorized", {}),
    ("payment", "payment", {}),
    ("not included", "not_included", {}),
    ("quota", "insufficient_quota", {}),
    ("cloudflare", "cloudflare", {}),
    ("connection refused", "refuse", {}),
    ("model", "bad_model", {}),
    ("not found", "not_found", {}),
    ("revoked", "revoked", {}),
]

REFRESHES = ("reused", "invalidated", "invalid_grant", "bad_json", "cut", "cloudflare", "500", "429")


class Stage:
    """One account after another, each unknown until its turn: no failure hides the next one."""

    def __init__(self, stand: Stand, ears: Ears, secrets: Secrets) -> None:
        self.stand = stand
        self.ears = ears
        self.secrets = secrets
        self.account: SimAccount

    async def enter(self) -> SimAccount:
        """Let a new account be the only one."""
        stand, number = self.stand, len(self.stand.sim.accounts)
        self.account = stand.sim.add_account(
            f"c{number}", email=f"canary.owner{number}@canary-mail{number}.example"
        )
        self.secrets.add(self.account)
        # Named by its address, as many are.
        file = stand.auths / f"codex-{self.account.email}-plus.json"

        def replace() -> None:
            for old in stand.auths.glob("*.json"):
                old.unlink()
            file.write_text(json.dumps(self.account.flat_file()), encoding="utf-8")
            file.chmod(0o600)

        await asyncio.to_thread(replace)
        await stand.daemon.keeper.load()
        return self.account

    async def meet(self, name: str, state: str, options: dict[str, Any], **fields: Any) -> None:
        """Ask once while the account is in *state*."""
        self.account.set(state, **options)
        before = len(self.stand.sim.requests)
        await self.ears.turn(name, **fields)
        assert len(self.stand.sim.requests) > before, f"{name} never reached the backend"
        self.secrets.add(self.account)

    async def every_failure(self) -> None:
        """Go through all that can go wrong with a turn."""
        for name, state, options in PLAIN:
            for codex in (False, True):
                await self.enter()
                await self.meet(f"{name}, codex {codex}", state, dict(options), codex=codex)
        for i, (name, _, _) in enumerate(echoes(await self.enter())):
            for fields in (
                {"codex": False, "stream": True},
                {"codex": False, "stream": False},
                {"codex": True, "stream": True},
                {"path": "/v1/alpha/search"},
            ):
                _, state, options = list(echoes(await self.enter()))[i]
                await self.meet(f"{name} {fields}", state, options, **fields)

    async def every_refresh(self) -> None:
        """Go through all that can go wrong with an exchange."""
        for mode in REFRESHES:
            await self.enter()
            await self.meet(f"exchange {mode}", "unauthorized", {"refresh": mode})
            await settle(self.ears, f"after exchange {mode}")
            self.secrets.add(self.account)


async def odd_requests(ears: Ears) -> None:
    """Ask wrongly, with secrets in all the places where a client may put one."""
    await ears.ask("unknown key", "GET", "/stats", headers={"x-api-key": OTHER_KEY})
    await ears.ask(
        "unknown key in a turn", "POST", "/v1/responses", headers={"x-api-key": OTHER_KEY}, json={}
    )
    query = {"key": CLIENT_KEY, "api_key": OTHER_KEY}
    await ears.ask("key in the query", "GET", "/v1/models", params=query, headers=KEYED)
    await ears.ask("key in an unknown query", "GET", "/nowhere", params=query, headers=KEYED)
    await ears.ask("key as an id", "GET", "/health", headers={**KEYED, "x-request-id": f"{PROMPT} x"})
    for name, body in {
        "no json": PROMPT.encode(),
        "cut": json.dumps({"model": STANDARD, "input": PROMPT})[:-2].encode(),
        "part": json.dumps({"model": STANDARD, "input": [{"role": "user", "content": [PROMPT]}]}).encode(),
        "input": json.dumps({"model": STANDARD, "input": {PROMPT: PROMPT}}).encode(),
        "no model": json.dumps({"input": PROMPT}).encode(),
        "unknown": json.dumps({"model": STANDARD, "input": PROMPT, "wrong": PROMPT}).encode(),
    }.items():
        headers = {**KEYED, "Content-Type": "application/json"}
        await ears.ask(f"body: {name}", "POST", "/v1/responses", data=body, headers=headers)


async def settle(ears: Ears, name: str) -> None:
    """Look at everything an owner looks at."""
    for path in ("/health", "/readyz", "/livez", "/stats", "/v1/models"):
        await ears.ask(f"{path} {name}", "GET", path, headers=KEYED)
    for path in ("/refresh", "/check-quota"):
        await ears.ask(f"{path} {name}", "POST", path, headers=KEYED)


def findings(secrets: Secrets, texts: dict[str, str]) -> list[str]:
    return [f"{found} in {place}" for place, text in texts.items() for found in secrets.in_text(text)]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a daemon would write to stderr, at its most talkative."""
    stream = io.StringIO()
    root, ours = logging.getLogger(), logging.getLogger("codex_proxy")
    levels = root.level, ours.level
    handler = logs.setup("debug", stream)
    yield stream
    root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)
    logging.getLogger("aiohttp.access").disabled = False


async def test_no_secret_and_no_word_of_a_conversation_gets_out(tmp_path: Path, log: io.StringIO) -> None:
    secrets = Secrets()
    keys = f"[{{me: {CLIENT_KEY}}}]"
    async with standing(tmp_path, accounts=0, max_retry=0, api_keys=keys, log_level="debug") as stand:
        ears = Ears(stand.session)
        stage = Stage(stand, ears, secrets)
        account = await stage.enter()
        junk = json.dumps({"access_token": account.tokens.access, "email": account.email})[:-1]
        broken = stand.auths / f"{account.email}.json"
        await asyncio.to_thread(broken.write_text, junk, encoding="utf-8")
        await stand.daemon.keeper.load()

        stand.sim.script(Script.text(ANSWER), Script.reasoning("**Thinking**", ANSWER))
        await ears.turn("good")
        await ears.turn("good, plain", stream=False)
        assert ANSWER in ears.heard["good, plain"]
        await settle(ears, "at first")
        assert "c***@c***.example" in ears.heard["/stats at first"].replace("…", "***")

        await odd_requests(ears)
        await stage.every_failure()
        await settle(ears, "after failures")
        await stage.every_refresh()
        await behind_a_proxy(stand, stage)

    assert {200, 400, 401, 404, 429} <= set(ears.statuses.values())
    lines = log.getvalue().splitlines()
    assert len(lines) > 200, "debug lines were not written"
    assert any("[token]" in text and "[email]" in text for text in ears.heard.values()), "nothing was echoed"

    assert findings(secrets, ears.heard) == []
    assert findings(secrets, {f"line {i}: {line[:160]}": line for i, line in enumerate(lines)}) == []
    # Who had the conversation sees it; the log of the machine does not.
    assert [line for line in lines if PROMPT in line or ANSWER in line] == []
    assert "Traceback" not in log.getvalue()
    assert findings(secrets, await asyncio.to_thread(other_files, tmp_path / "data")) == []


async def behind_a_proxy(stand: Stand, stage: Stage) -> None:
    """Ask by a way out whose address holds a password."""
    await stage.enter()
    live = stand.daemon.live
    for scheme in ("http", "socks5"):
        url = f"{scheme}://user:{PROXY_PASSWORD}@127.0.0.1:9"
        live.replace(dataclasses.replace(live.current, proxy_url=url))
        await stage.enter()
        await stage.ears.turn(f"a {scheme} proxy refuses")
        await settle(stage.ears, f"behind a {scheme} proxy")


def other_files(data_dir: Path) -> dict[str, str]:
    """Read what the daemon keeps beside credentials that wait to be saved."""
    return {
        str(path): path.read_text(encoding="utf-8", errors="replace")
        for path in data_dir.rglob("*")
        if path.is_file() and not path.name.endswith(".tokens.json")
    }
