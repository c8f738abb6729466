"""Questions as they come in a URL."""

import pytest

from codex_proxy.errors import RequestError
from codex_proxy.records.asking import Filter, Page


def test_without_anything_all_are_meant() -> None:
    assert Page.of({}) == Page(Filter(), 100, None)
    assert Page.of(dict.fromkeys(["limit", "before", "caller", "q", "since", "outcome"], "")) == Page(
        Filter(), 100, None
    )


def test_everything_that_can_be_asked() -> None:
    page = Page.of({
        "limit": "7", "before": "1795672498555000123", "caller": " laptop ", "account": "work", "model": "gpt-5.5",
        "outcome": "failed", "route": "chat", "client": "codex", "q": "abc", "since": "1.5", "until": "2e9",
        "min_seconds": "0",
    })  # fmt: skip
    wanted = Filter("laptop", "work", "gpt-5.5", "failed", "chat", "codex", "abc", 1.5, 2e9, 0.0)
    assert page == Page(wanted, 7, 1795672498555000123)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "0"), ("limit", "1001"), ("limit", "-1"), ("limit", "²"), ("limit", "1" * 40), ("limit", "x"),
        ("before", "x"), ("before", "-1"), ("before", "9" * 19), ("before", "1" * 20), ("before", "1.5"),
        ("outcome", "open"), ("outcome", "good"),
        ("since", "x"), ("since", "-1"), ("until", "nan"), ("until", "inf"), ("min_seconds", "1e30"),
        ("outcom", "failed"), ("offset", ""),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        Page.of({name: value})
    assert (caught.value.param, caught.value.status) == (name, 400)


def test_a_text_is_bounded_and_can_be_asked_for() -> None:
    wanted = Page.of({"q": "x" * 100_000, "caller": "\ud800"}).wanted
    assert (len(wanted.q or ""), wanted.caller) == (256, "?")
