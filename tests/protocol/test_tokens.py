"""Token estimates."""

from typing import Any

import pytest

from codex_proxy.protocol.tokens import (
    IMAGE_TOKENS,
    ITEM_OVERHEAD,
    LOW_DETAIL_IMAGE_TOKENS,
    count_request,
    estimate,
)


@pytest.mark.parametrize(
    ("text", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("äöü", 2), ("\ud83d", 1), ("漢字", 2)]
)
def test_an_estimate_is_a_fourth_of_the_bytes_rounded_up(text: str, tokens: int) -> None:
    assert estimate(text) == tokens


def words(text: str) -> int:
    return len(text.split())


def message(content: Any, role: str = "user") -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({}, 0),
        ({"input": "one two three"}, 3 + ITEM_OVERHEAD),
        ({"instructions": "be brief", "input": []}, 2),
        ({"input": [message("one two")]}, 3 + ITEM_OVERHEAD),
        ({"input": [message([{"type": "input_text", "text": "one two"}])]}, 3 + ITEM_OVERHEAD),
        ({"input": [message([{"type": "refusal", "refusal": "no no no"}], "assistant")]}, 4 + ITEM_OVERHEAD),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "look", "arguments": "a b"}]},
            3 + ITEM_OVERHEAD,
        ),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "a b c"}]}, 3 + ITEM_OVERHEAD),
        (
            {"input": [{"type": "function_call_output", "output": [{"type": "input_text", "text": "a b"}]}]},
            2 + ITEM_OVERHEAD,
        ),
        (
            {
                "input": [
                    message([{"type": "input_image", "image_url": "data:image/png;base64," + "A" * 9000}])
                ]
            },
            1 + IMAGE_TOKENS + ITEM_OVERHEAD,
        ),
        (
            {"input": [message([{"type": "input_image", "detail": "low", "image_url": "u"}])]},
            1 + LOW_DETAIL_IMAGE_TOKENS + ITEM_OVERHEAD,
        ),
        (
            {"input": [{"type": "reasoning", "summary": [{"text": "a b"}], "encrypted_content": "g" * 999}]},
            2 + 4,
        ),
        ({"input": [{"type": "compaction", "encrypted_content": "g" * 1600}]}, 300 + ITEM_OVERHEAD),
        ({"tools": [{"type": "function", "name": "f"}]}, 1),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "object"}}}}, 1),
    ],
)
def test_a_request_counts_what_the_model_reads(body: dict[str, Any], tokens: int) -> None:
    assert count_request(body, words) == tokens


@pytest.mark.parametrize("odd", [None, 7, True, [], {}, [None, 7, [], {"type": []}], {"a": 1}, "\ud800"])
def test_anything_can_be_counted(odd: Any) -> None:
    for key in ("instructions", "input", "tools", "text"):
        assert count_request({key: odd}) >= 0
    for key in ("role", "content", "summary", "output", "action", "encrypted_content", "type", "tools"):
        assert count_request({"input": [{key: odd}]}) >= 0
        assert count_request({"input": [{"content": [{key: odd}]}]}) >= 0


def test_a_bottomless_tool_is_no_crash() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert count_request({"tools": [deep]}) == 0
