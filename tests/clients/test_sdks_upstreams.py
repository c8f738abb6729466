"""The SDKs of OpenAI and Anthropic, served by an upstream as if they had called it themselves."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import openai
import pytest

from codex_proxy.simulator.upstream import SimUpstream
from codex_proxy.trace import UsageSource
from tests.daemon.upstreams import Stage, staged


@contextlib.asynccontextmanager
async def calling(folder: Path) -> AsyncIterator[tuple[Stage, openai.AsyncOpenAI, anthropic.AsyncAnthropic]]:
    async with (
        staged(folder, SimUpstream()) as stage,
        openai.AsyncOpenAI(base_url=f"{stage.daemon.url}/v1", api_key="sk-any", max_retries=0) as one,
        anthropic.AsyncAnthropic(base_url=stage.daemon.url, api_key="sk-any", max_retries=0) as other,
    ):
        yield stage, one, other


async def test_chat(tmp_path: Path) -> None:
    async with calling(tmp_path) as (stage, client, _):
        plain = await client.chat.completions.create(
            model="gpt-5.5", messages=[{"role": "user", "content": "hello"}], n=2
        )
        assert [one.message.content for one in plain.choices] == ["up says: hello"] * 2
        words = ""
        async for chunk in await client.chat.completions.create(
            model="gpt-5.5", messages=[{"role": "user", "content": "hello"}], stream=True
        ):
            # Whoever reads `choices[0]` without a look would break on the chunk that was not asked for.
            words += chunk.choices[0].delta.content or ""
            assert chunk.usage is None
        assert words == "up says: hello"
        assert stage.trace.usage.source is UsageSource.BACKEND
        told = [
            chunk.usage
            async for chunk in await client.chat.completions.create(
                model="gpt-5.5",
                messages=[{"role": "user", "content": "hello"}],
                stream=True,
                stream_options={"include_usage": True},
            )
        ]
        assert told[-1] is not None
        assert told[-1].prompt_tokens == 11


async def test_responses(tmp_path: Path) -> None:
    async with calling(tmp_path) as (_, client, _):
        first = await client.responses.create(model="gpt-5.5", input="hello")
        assert first.output_text == "up says: hello"
        async with client.responses.stream(
            model="gpt-5.5", input="again", previous_response_id=first.id
        ) as stream:
            final = await stream.get_final_response()
        assert final.output_text == "up says: again"
        assert final.usage is not None


async def test_embeddings_and_models(tmp_path: Path) -> None:
    async with calling(tmp_path) as (_, client, _):
        # The SDK asks for base64 by itself, and unpacks it.
        made = await client.embeddings.create(model="text-embedding-3-small", input=["a", "bc"])
        assert [one.embedding for one in made.data] == [[1.0, 0.5, -1.0], [2.0, 0.5, -1.0]]
        assert "text-embedding-3-small" in [one.id async for one in client.models.list()]


async def test_messages(tmp_path: Path) -> None:
    async with calling(tmp_path) as (stage, _, client):
        plain = await client.messages.create(
            model="gpt-5.5", max_tokens=50, messages=[{"role": "user", "content": "hello"}]
        )
        assert plain.content[0].type == "text"
        assert plain.content[0].text == "up says: hello"
        async with client.messages.stream(
            model="gpt-5.5", max_tokens=50, messages=[{"role": "user", "content": "hello"}]
        ) as stream:
            final = await stream.get_final_message()
        assert final.usage.output_tokens == 3
        assert stage.trace.usage.input_tokens == 15


async def test_a_broken_stream_is_an_error_to_each_of_them(tmp_path: Path) -> None:
    async with calling(tmp_path) as (stage, client, other):
        stage.up.says, stage.up.delay = "one two three four five", 0.01
        stage.up.fault("cut", after=5)
        with pytest.raises(openai.APIError):
            async for _ in await client.chat.completions.create(
                model="gpt-5.5", messages=[{"role": "user", "content": "hello"}], stream=True
            ):
                pass
        with pytest.raises(anthropic.APIError):
            async with other.messages.stream(
                model="gpt-5.5", max_tokens=50, messages=[{"role": "user", "content": "hello"}]
            ) as stream:
                await stream.get_final_message()
