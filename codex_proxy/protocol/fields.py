"""Reads the fields of a body that may hold anything: the value, or an error that names its place.

Names with `get_` look a key up and let it be missing or null; the others take a value that has to be there.

A path is made when something is wrong, from the inside out: whoever finds it names the field as far as it
knows (`image_url.url`), and each loop that passes the error on puts what it is at in front
(`messages.3.content.0`). So a body that is right costs no path at all, however many items it has.
"""

from typing import Any

from codex_proxy.errors import RequestError
from codex_proxy.protocol.wire import JsonObject

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 16 * 1024
"""How many stop sequences there may be, and how long they may be together: more than anybody needs, and little
enough to be kept for each answer."""

MAX_QUOTED = 64
"""How much of a caller's word an error repeats: it may have megabytes."""

_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "a boolean"),
    (int, "a number"),
    (float, "a number"),
    (str, "a string"),
    (list, "a list"),
    (dict, "an object"),
)


class FieldError(RequestError):
    """Something is wrong with a field, whose path may grow to the left; see the module.

    Args:
        path: The field, as far as it is known; empty for the very thing that is read.
        text: What is wrong: a whole sentence, or what follows the path if *begins*.
        begins: Whether the sentence begins with the path.
    """

    def __init__(self, path: str, text: str, *, code: str | None, begins: bool = False) -> None:
        super().__init__(f"{path} {text}" if begins else text, param=path, code=code)
        self._rest = text if begins else None

    def within(self, outer: str) -> None:
        """Say what the path so far is counted from."""
        path = f"{outer}.{self.param}" if self.param else outer
        self.param = path
        if self._rest is not None:
            self.message = f"{path} {self._rest}"
            self.args = (self.message,)


def wrong(path: str, expected: str, value: Any) -> FieldError:
    """Return the error for a value of another kind than *expected* at *path*."""
    if value is None:
        text = f"must be {expected}, and is missing or null"
    else:
        found = next((name for kind, name in _KINDS if isinstance(value, kind)), "something else")
        text = f"must be {expected}, not {found}"
    return FieldError(path, text, code="invalid_type", begins=True)


def quoted(word: str) -> str:
    """Return *word* as an error repeats it."""
    return repr(word if len(word) <= MAX_QUOTED else f"{word[:MAX_QUOTED]}...")


def a_string(value: Any, path: str) -> str:
    """Return *value*, which must be a string."""
    if not isinstance(value, str):
        raise wrong(path, "a string", value)
    return value


def a_boolean(value: Any, path: str) -> bool:
    """Return *value*, which must be true or false."""
    if not isinstance(value, bool):
        raise wrong(path, "a boolean", value)
    return value


def an_object(value: Any, path: str) -> JsonObject:
    """Return *value*, which must be an object."""
    if not isinstance(value, dict):
        raise wrong(path, "an object", value)
    return value


def a_list(value: Any, path: str) -> list[Any]:
    """Return *value*, which must be a list."""
    if not isinstance(value, list):
        raise wrong(path, "a list", value)
    return value


def get_string(fields: JsonObject, key: str, path: str = "") -> str | None:
    """Return a string, None when there is none; *path* is where it stands, if not at the top."""
    value = fields.get(key)
    if value is None or isinstance(value, str):
        return value
    raise wrong(path or key, "a string", value)


def get_boolean(fields: JsonObject, key: str, path: str = "", *, default: bool = False) -> bool:
    """Return true or false, *default* when neither is said."""
    value = fields.get(key)
    if value is None:
        return default
    if isinstance(value, bool):
        return value
    raise wrong(path or key, "a boolean", value)


def get_object(fields: JsonObject, key: str, path: str = "") -> JsonObject | None:
    """Return an object, None when there is none."""
    value = fields.get(key)
    if value is None or isinstance(value, dict):
        return value
    raise wrong(path or key, "an object", value)


def get_list(fields: JsonObject, key: str, path: str = "") -> list[Any]:
    """Return a list, an empty one when there is none."""
    value = fields.get(key)
    if isinstance(value, list):
        return value
    if value is None:
        return []
    raise wrong(path or key, "a list", value)


def stop_sequences(value: Any) -> tuple[str, ...]:
    """Return what OpenAI's `stop` holds: one string or several; an empty one stands nowhere."""
    if value is None:
        return ()
    if not isinstance(value, str | list):
        raise wrong("stop", "a string or a list of strings", value)
    given = [value] if isinstance(value, str) else value
    for index, one in enumerate(given):
        if not isinstance(one, str):
            raise wrong(f"stop.{index}", "a string", one)
    return check_stops(tuple(one for one in given if one), "stop")


def check_stops(stops: tuple[str, ...], path: str) -> tuple[str, ...]:
    """Return *stops* when they are not too many."""
    if len(stops) > MAX_STOPS or sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        text = f"there may be {MAX_STOPS} stop sequences, with {MAX_STOP_CHARACTERS} characters in all"
        raise RequestError(text, param=path, code="invalid_value")
    return stops


def wants_usage(fields: JsonObject) -> bool:
    """Tell whether a stream of OpenAI's older dialects shall end with its usage."""
    options = get_object(fields, "stream_options")
    return options is not None and get_boolean(options, "include_usage", "stream_options.include_usage")
