"""The shared fixtures do what they say."""

from typing import Any

import aiohttp


async def test_one_shot_http_answers_without_a_server(one_shot_http: Any) -> None:
    one_shot_http.post("https://issuer.test/oauth/token", status=401, payload={"error": "no"})
    async with (
        aiohttp.ClientSession() as session,
        session.post("https://issuer.test/oauth/token") as response,
    ):
        assert response.status == 401
        assert await response.json() == {"error": "no"}
