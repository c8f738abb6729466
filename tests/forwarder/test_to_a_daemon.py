"""A forwarder in front of a whole proxy, as a caller meets the two."""

from pathlib import Path

import aiohttp
import orjson
import pytest

from tests.forwarder.desk import forwarding, wanted
from tests.harness import question, standing

# What the simulator and the daemon are is tested elsewhere, on one loop.
pytestmark = pytest.mark.asyncio(loop_factories=["asyncio"])


async def test_turns_over_http_and_over_a_websocket(tmp_path: Path) -> None:
    async with (
        standing(tmp_path, accounts=1, api_keys="[sk-a-key-of-the-far-server]") as stand,
        forwarding(wanted(stand.url + "/v1")) as forwarder,
        aiohttp.ClientSession(
            f"http://127.0.0.1:{forwarder.port}",
            headers={"Authorization": "Bearer sk-a-key-of-the-far-server"},
        ) as session,
    ):
        async with session.post("/u1/v1/responses", json=question("over http")) as answer:
            body = await answer.text()
            assert answer.status == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert "x-request-id" in answer.headers
        assert "response.completed" in body
        async with session.ws_connect("/v1/responses") as socket:
            await socket.send_str(
                orjson.dumps({"type": "response.create", **question("over a socket")}).decode()
            )
            types = []
            async for message in socket:
                types.append(orjson.loads(message.data)["type"])
                if types[-1] == "response.completed":
                    break
        assert "response.output_text.delta" in types
        async with session.get("/v1/models", headers={"Authorization": "Bearer wrong"}) as refused:
            assert (refused.status, (await refused.json())["error"]["code"]) == (401, "invalid_api_key")
