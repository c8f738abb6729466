"""Errors of fields: a path is put together from the inside out, and says the same as one that was whole at once."""

from collections.abc import Callable
from typing import Any

import pytest

from codex_proxy.errors import RequestError
from codex_proxy.protocol.fields import FieldError, get_boolean, get_list, get_object, get_string, wrong


def grown(error: FieldError, *outer: str) -> FieldError:
    for path in outer:
        error.within(path)
    return error


def test_a_path_grows_to_the_left_and_its_sentence_with_it() -> None:
    error = grown(wrong("url", "a string", 5), "image_url", "content.0", "messages.3")
    path = "messages.3.content.0.image_url.url"
    assert isinstance(error, RequestError)
    assert (error.param, error.code) == (path, "invalid_type")
    assert error.message == str(error) == f"{path} must be a string, not a number"


def test_the_very_thing_that_is_read_is_named_by_where_it_stands() -> None:
    error = grown(wrong("", "an object", None), "tools.0")
    assert error.param == "tools.0"
    assert error.message == "tools.0 must be an object, and is missing or null"


def test_a_sentence_of_its_own_stays_whatever_the_path() -> None:
    error = grown(FieldError("", "the picture has no address", code="x"), "image_url", "content.1")
    assert (error.param, error.message) == ("content.1.image_url", "the picture has no address")


@pytest.mark.parametrize(
    ("get", "good", "bad", "default"),
    [
        (get_string, "x", 5, None),
        (get_boolean, True, "x", False),
        (get_object, {"a": 1}, [], None),
        (get_list, [1], {}, []),
    ],
)
def test_a_field_may_be_missing_or_null_and_nothing_else(
    get: Callable[..., Any], good: Any, bad: Any, default: Any
) -> None:
    assert get({"key": good}, "key") == good
    assert get({}, "key") == get({"key": None}, "key") == default
    with pytest.raises(FieldError) as caught:
        get({"key": bad}, "key")
    assert caught.value.param == "key"
    with pytest.raises(FieldError) as caught:
        get({"key": bad}, "key", "outer.key")
    assert caught.value.param == "outer.key"
