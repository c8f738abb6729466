"""The requests that cost quota: turns, compaction, search, images."""

import asyncio
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
from typing import TYPE_CHECKING

from codex_proxy.protocol import sse
from codex_proxy.protocol.wire import JsonObject, dumps
from codex_proxy.simulator.account import SimAccount
from codex_proxy.simulator.checks import check_bindings, check_shape, seal
from codex_proxy.simulator.compose import TERMINAL, Composer, Turn
from codex_proxy.simulator.exchange import Exchange, silence
from codex_proxy.simulator.faults import (
    MESSAGES,
    Fault,
    Reply,
    bad_model,
    error_body,
    refusal,
    usage_limit,
)
from codex_proxy.simulator.gate import authenticate, meet
from codex_proxy.simulator.quota import rate_limits_event
from codex_proxy.simulator.reply import choose
from codex_proxy.simulator.script import Script

if TYPE_CHECKING:
    from codex_proxy.simulator.server import Simulator

# Frames that leave together when nobody asks for a pace.
WRITE_SIZE = 64 * 1024

_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


class Turns:
    """Answer what costs quota, as the state and the scripts of the account say."""

    def __init__(self, sim: "Simulator") -> None:
        self._sim = sim
        self._serial = 0

    async def responses(self, exchange: Exchange) -> Reply | None:
        """Answer a turn with a stream of events."""
        account = authenticate(self._sim, exchange)
        if isinstance(account, Reply):
            return account
        body, refused = exchange.parse()
        if refused is None and self._sim.strict:
            refused = check_shape(body, exchange.request.headers, self._sim.wire)
        if refused is None and not (isinstance(body, dict) and isinstance(body.get("input"), list)):
            refused = Reply.json({"detail": "Input must be a list"}, 400)
        if refused is not None:
            return refused
        slug = str(body.get("model"))
        self._serial += 1
        size = max(1, len(exchange.received.body) // 4)
        key = body.get("prompt_cache_key")
        turn = Turn(
            body=body,
            model=slug,
            served_model=self._sim.served_model or slug,
            tag=account.tag,
            user_id=account.user_id,
            now=self._sim.now(),
            serial=self._serial,
            input_tokens=size,
            cached_tokens=min(size, account.cache.get(key, 0)) if isinstance(key, str) else 0,
            full_output=self._sim.full_output,
        )
        queue = account.scripts or self._sim.scripts
        queued = queue.popleft() if queue else None
        script = queued or choose(turn)
        exchange.script = script
        met = await meet(self._sim, exchange, account, slug, is_turn=True)
        refused = met if isinstance(met, Reply) else self._check_account(exchange, account, body, slug)
        fault = met if isinstance(met, Fault) else None
        spoiled = refused is not None or (fault is not None and fault.state != "slow")
        if queued is not None and queued.fault is None and spoiled:
            # A turn that goes wrong leaves its script to the next one.
            queue.appendleft(queued)
        if refused is not None:
            return refused
        if script.fault is not None:
            script = Script.text("The answer to this turn goes wrong in the middle.")
        composer = Composer.play(turn, script)
        await self._stream(exchange, account, turn, composer, script, fault)
        return None

    def _check_account(
        self, exchange: Exchange, account: SimAccount, body: JsonObject, slug: str
    ) -> Reply | None:
        family = account.full_family(slug)
        if family is not None:
            windows = account.families.get(family, account)
            name, window = max(
                (("primary", windows.primary), ("secondary", windows.secondary)),
                key=lambda pair: (pair[1].used_percent >= 100, pair[1].reset_at),
            )
            return usage_limit(account, family, window.reset_at, {"window": name})
        if slug not in account.models:
            return bad_model(slug)
        if not self._sim.strict:
            return None
        state = exchange.request.headers.get("x-codex-turn-state")
        return check_bindings(body, state, account.tag, (other.tag for other in self._sim.accounts))

    async def _stream(
        self,
        exchange: Exchange,
        account: SimAccount,
        turn: Turn,
        composer: Composer,
        script: Script,
        fault: Fault | None,
    ) -> None:
        options = fault.options if fault is not None else {}
        state = fault.state if fault is not None else ""
        delay = float(options.get("per_event", 0.0)) if state == "slow" else script.delay
        bend(composer, fault)
        pause_at = _pause(fault, len(composer.frames))
        if pause_at < 0:
            await silence(options.get("seconds"))
        await exchange.open_stream(turn)
        before = rate_limits_event(account)
        if fault is None or fault.state in {"slow", "stall", "incomplete"}:
            # The head tells what was used before this turn, the last event what it added.
            account.count(turn.model, turn.input_tokens - 0.9 * turn.cached_tokens + turn.output_tokens)
            key = turn.body.get("prompt_cache_key")
            if isinstance(key, str):
                account.cache[key] = turn.input_tokens
        packets = self._packets(turn, composer, exchange, before, rate_limits_event(account))
        sizes: Iterator[int] | None = None
        if script.chunk is not None:
            sizes = repeat(script.chunk) if isinstance(script.chunk, int) else cycle(script.chunk)
        buffer = bytearray()
        for i, packet in enumerate(packets):
            if i == pause_at:
                await exchange.write(buffer, sizes)
                await silence(options.get("seconds"))
            buffer += packet
            if delay or len(buffer) >= WRITE_SIZE:
                await exchange.write(buffer, sizes)
                if delay:
                    await asyncio.sleep(delay)
        await exchange.write(buffer, sizes)
        if pause_at == len(packets) and state == "stall":
            await silence(options.get("seconds"))
        if state == "cut" and not options.get("clean"):
            # The loop hands over what was written before the connection goes.
            await asyncio.sleep(0)
            exchange.abort(reset=bool(options.get("reset")))
            return
        exchange.received.finished = True
        await exchange.close_stream()

    def _packets(
        self, turn: Turn, composer: Composer, exchange: Exchange, before: JsonObject, after: JsonObject
    ) -> list[bytes]:
        """Return the frames as they are sent, the events beside the answer attached to them."""
        frames = composer.frames
        packets = [frame.data for frame in frames]
        if not self._sim.extra_events or not frames or frames[0].kind != "response.created":
            return packets
        packets[0] = sse.frame("codex.rate_limits", dumps(before)) + packets[0]
        if len(packets) > 1:
            headers = {"openai-model": turn.served_model}
            state = exchange.turn_state(turn)
            if state is not None:
                headers["x-codex-turn-state"] = state
            event = {"type": "response.metadata", "headers": headers, "metadata": {}}
            packets[1] += sse.frame("response.metadata", dumps(event))
        if len(packets) > 2 and frames[-1].kind in TERMINAL:
            packets[-1] = sse.frame("codex.rate_limits", dumps(after)) + packets[-1]
        return packets

    async def _unary(
        self, exchange: Exchange, answer: Callable[[SimAccount, JsonObject], Reply]
    ) -> Reply | None:
        """Answer a turn that is no stream; the states of the account hold here too."""
        account = authenticate(self._sim, exchange)
        if isinstance(account, Reply):
            return account
        body, refused = exchange.parse()
        if refused is not None:
            return refused
        if not isinstance(body, dict):
            return Reply.json(error_body("Invalid request body: expected an object."), 400)
        slug = str(body.get("model", ""))
        met = await meet(self._sim, exchange, account, slug, is_turn=True)
        if isinstance(met, Reply):
            return met
        if met is not None:
            match met.state:
                case "stall":
                    await silence(met.options.get("seconds"))
                case "cut":
                    exchange.abort(reset=bool(met.options.get("reset")))
                    return None
                case "overloaded_in_stream":
                    return refusal(Fault("overloaded"), account, slug)
                case "context_length":
                    return refusal(met, account, slug)
                case "failed":
                    code = str(met.options.get("code", "server_error"))
                    return Reply.json(
                        error_body(MESSAGES.get(code, "Failed."), code=code, kind="server_error"), 500
                    )
                case _:
                    pass
        return answer(account, body)

    async def compact(self, exchange: Exchange) -> Reply | None:
        """Compact a conversation in one JSON answer."""

        def answer(account: SimAccount, body: JsonObject) -> Reply:
            slug = body.get("model")
            if not isinstance(slug, str) or not slug:
                return Reply.json(
                    error_body(
                        "Missing required parameter: 'model'.",
                        code="missing_required_parameter",
                        param="model",
                    ),
                    400,
                )
            if self._sim.strict and "stream" in body:
                return Reply.json({"detail": "Unsupported parameter: stream"}, 400)
            items = body.get("input")
            if not isinstance(items, list | str):
                return Reply.json({"detail": "Input must be a list"}, 400)
            bound = {**body, "input": items if isinstance(items, list) else []}
            refused = self._check_account(exchange, account, bound, slug)
            if refused is not None:
                return refused
            self._serial += 1
            size = max(1, len(exchange.received.body) // 4)
            sealed = seal(account.tag, k="compaction", n=self._serial, t=f"{len(bound['input'])} items")
            kept = [i for i in bound["input"] if isinstance(i, dict) and i.get("role") == "user"]
            account.count(slug, size)
            value = {
                "id": f"resp_{account.tag}{self._serial:038x}",
                "object": "response.compaction",
                "created_at": int(self._sim.now()),
                "output": [
                    *kept,
                    {
                        "id": f"cmp_{account.tag}{self._serial:038x}",
                        "type": "compaction",
                        "encrypted_content": sealed,
                    },
                ],
                "usage": {
                    "input_tokens": size,
                    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                    "output_tokens": 20,
                    "output_tokens_details": {"reasoning_tokens": 0},
                    "total_tokens": size + 20,
                },
            }
            return Reply.json(value, headers=exchange.state_headers(account, self._serial))

        return await self._unary(exchange, answer)

    async def search(self, exchange: Exchange) -> Reply | None:
        """Search the web, without a web."""

        def answer(account: SimAccount, body: JsonObject) -> Reply:
            commands = body.get("commands")
            asked = commands.get("search_query") if isinstance(commands, dict) else None
            asked = asked if isinstance(asked, list) else []
            words = [str(q.get("q", "")) for q in asked if isinstance(q, dict)]
            text = f"Simulated results for {', '.join(words) or 'nothing'}: [a page](https://example.com/simulated)"
            return Reply.json({"encrypted_output": seal(account.tag, k="search"), "output": text})

        return await self._unary(exchange, answer)

    async def images(self, exchange: Exchange) -> Reply | None:
        """Make an image of one pixel."""

        def answer(_account: SimAccount, _body: JsonObject) -> Reply:
            usage = {"input_tokens": 8, "output_tokens": 16, "total_tokens": 24}
            return Reply.json({
                "created": int(self._sim.now()),
                "data": [{"b64_json": _PIXEL}],
                "usage": usage,
            })

        return await self._unary(exchange, answer)


def bend(composer: Composer, fault: Fault | None) -> None:
    """Let *fault* happen to the answer that *composer* has played."""
    if fault is None:
        return
    options = fault.options
    frames = composer.frames
    good = max(0, len(frames) - 3)
    match fault.state:
        case "failed":
            composer.keep(2 + min(good, int(options.get("after", 0))))
            message = options.get("message")
            composer.fail(
                str(options.get("code", "server_error")), message, how=str(options.get("how", "failed"))
            )
        case "overloaded_in_stream":
            composer.keep(2 + min(good, int(options.get("after", 0))))
            composer.fail("server_is_overloaded", how=str(options.get("how", "failed")))
        case "context_length":
            composer.keep(2)
            composer.fail("context_length_exceeded")
        case "incomplete":
            composer.keep(2 + min(good, int(options.get("after", good))))
            composer.end(
                "incomplete", incomplete_details={"reason": options.get("reason", "max_output_tokens")}
            )
        case "cut":
            # Never the whole answer: a cut stream has no end.
            composer.keep(min(len(frames) - 1, int(options.get("after", 4))))
        case _:
            pass


def _pause(fault: Fault | None, count: int) -> int:
    """Return before which frame a stall begins; -1 is before the headers, *count* + 1 never."""
    if fault is None or fault.state != "stall":
        return count + 1
    if "after" in fault.options:
        return min(count, int(fault.options["after"]))
    match fault.options.get("where", "headers"):
        case "headers":
            return -1
        case "created":
            return min(2, count)
        case "middle":
            return max(3, count // 2)
        case where:
            raise ValueError(f"stall knows no place {where!r}")
