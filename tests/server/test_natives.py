"""What the price of a request depends on is said once, where its body passes as it is."""

import pytest

from codex_proxy.errors import RequestError
from codex_proxy.server.natives import refuse_double

TOOLS = (
    b'"tools": [{"name": "task", "parameters": {"properties": {"model": {"type": "string"}, "Model": {}}}}]'
)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[1]",
        b'{"model": "gpt-5.5", "input": "one \\"model\\": two"}',
        b'{"model": "gpt-5.5", "service_tier": "flex", %b}' % TOOLS,
        b'{"input": "\\u006dodel \\u017f", "model": "gpt-5.5"}',
        b'{"input": [{"model": "a"}, {"model": "b", "service_tier": 1}], "model": "gpt-5.5"}',
    ],
)
def test_bodies_that_say_it_once_pass(body: bytes) -> None:
    refuse_double(body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"model": "gpt-5.4-mini", "model": "gpt-5.5-pro"}', "model"),
        (b'{"model": "gpt-5.4-mini", "Model": "gpt-5.5-pro"}', "model"),
        (b'{"MODEL": "gpt-5.5-pro"}', "model"),
        (b'{"model": "gpt-5.4-mini", "mod\\u0065l": "gpt-5.5-pro"}', "model"),
        (b'{"model": "gpt-5.5", "\\u017fervice_tier": "priority"}', "service_tier"),
        (b'{"model": "gpt-5.5", "service_tier": "flex", "service_tier": "priority"}', "service_tier"),
        (b' \n{"model": "a", "input": "x", "model": "b", %b}' % TOOLS, "model"),
    ],
)
def test_a_body_that_says_it_twice_is_refused(body: bytes, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        refuse_double(body)
    assert (refused.value.param, refused.value.status) == (param, 400)


def test_the_model_of_the_path_is_that_of_the_body() -> None:
    refuse_double(b'{"prompt": "x"}', "gpt-5.5")
    refuse_double(b'{"model": "gpt-5.5"}', "gpt-5.5")
    with pytest.raises(RequestError, match="path"):
        refuse_double(b'{"model": "gpt-5.5-pro"}', "gpt-5.5")


@pytest.mark.parametrize("body", [b'{"model": "a", "model": ', b'{"model": "a", "model": 1}' + b"]" * 3])
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(RequestError):
        refuse_double(body)


def test_what_is_too_deep_to_look_into_does_not_pass() -> None:
    with pytest.raises(RequestError):
        refuse_double(b'{"model": "a", "model": "b", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
