"""What goes over the wire to each kind of service, and what of its answer is a yes."""

import base64
import hashlib
import hmac
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from codex_proxy.alerts.episodes import Told
from codex_proxy.alerts.shapes import TEST, Message, refusal, render, retry_after
from codex_proxy.config import SHAPES, Webhook
from codex_proxy.net import Reply
from tests.accounts.making import NOW

URL = "https://hooks.example/secret?access_token=t"
FIRING = Told("error-share", "30 of 60 turns failed <&>", NOW - 60)
OVER = Told("pool-nearly-dry", "8% is left", NOW - 3_600, NOW)


def rendered(shape: str, *news: Told, secret: str = "", chat_id: str = "") -> tuple[str, Any]:
    hook = Webhook("h", shape, URL, chat_id, secret)
    url, body = render(hook, Message(NOW, news or (FIRING, OVER)), "host-1", NOW)
    return url, json.loads(body)


LINES = (
    "codex-proxy on host-1\n"
    "[firing] error-share: 30 of 60 turns failed <&>\n"
    "[resolved] pool-nearly-dry: over after 1 h; it was: 8% is left"
)


def test_generic_is_for_programs() -> None:
    url, body = rendered("generic")
    assert url == URL
    assert body["source"] == "codex-proxy"
    assert body["status"] == "firing"
    assert body["text"] == LINES
    assert body["alerts"] == [
        {
            "name": "error-share",
            "status": "firing",
            "text": FIRING.text,
            "since": NOW - 60,
            "resolved_at": None,
        },
        {
            "name": "pool-nearly-dry",
            "status": "resolved",
            "text": OVER.text,
            "since": NOW - 3_600,
            "resolved_at": NOW,
        },
    ]
    assert rendered("generic", OVER)[1]["status"] == "resolved"
    assert rendered("generic", Told(TEST, "hello", NOW))[1]["status"] == "test"


def test_slack_gets_its_own_signs_spelled_out() -> None:
    assert rendered("slack")[1] == {"text": LINES.replace("<&>", "&lt;&amp;&gt;")}


def test_telegram_is_told_for_whom() -> None:
    body = rendered("telegram", chat_id="-100")[1]
    assert (body["chat_id"], body["text"]) == ("-100", LINES)


def test_feishu_and_dingtalk_take_a_text() -> None:
    assert rendered("feishu")[1] == {"msg_type": "text", "content": {"text": LINES}}
    assert rendered("dingtalk") == (URL, {"msgtype": "text", "text": {"content": LINES}})


def test_feishu_signs_nothing_with_time_and_secret() -> None:
    body = rendered("feishu", secret="s3cret")[1]
    assert body["timestamp"] == str(int(NOW))
    expected = hmac.new(f"{int(NOW)}\ns3cret".encode(), b"", hashlib.sha256).digest()
    assert base64.b64decode(body["sign"]) == expected


def test_dingtalk_signs_time_and_secret_with_the_secret() -> None:
    url, _ = rendered("dingtalk", secret="s3cret")
    query = parse_qs(urlsplit(url).query)
    assert query["access_token"] == ["t"]
    assert query["timestamp"] == [str(int(NOW * 1000))]
    expected = hmac.new(b"s3cret", f"{int(NOW * 1000)}\ns3cret".encode(), hashlib.sha256).digest()
    assert base64.b64decode(query["sign"][0]) == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_many_at_once_are_counted_instead_of_told(shape: str) -> None:
    news = [Told("account-needs-login", f"acct-{number} needs a login", NOW) for number in range(25)]
    body = json.dumps(rendered(shape, *news, chat_id="1")[1])
    assert "acct-9 needs" in body
    assert "and 15 more" in body
    if shape != "generic":
        assert "acct-10 needs" not in body


@pytest.mark.parametrize(
    ("shape", "status", "body", "reason"),
    [
        ("generic", 200, b"", ""),
        ("generic", 204, b"", ""),
        ("slack", 200, b"ok", ""),
        ("slack", 404, b"no_service", "status 404"),
        (
            "generic",
            302,
            b"",
            "status 302; redirects are not followed, put its new address into the configuration",
        ),
        ("generic", 500, b"token=secret", "status 500"),
        ("telegram", 200, b'{"ok":true}', ""),
        ("telegram", 200, b'{"ok":false,"description":"secret"}', "refused ok False"),
        ("feishu", 200, b'{"code":0,"msg":"success"}', ""),
        ("feishu", 200, b'{"StatusCode":0}', ""),
        ("feishu", 200, b'{"code":19021,"msg":"sign match fail"}', "refused code 19021"),
        ("dingtalk", 200, b'{"errcode":0}', ""),
        ("dingtalk", 200, b'{"errcode":310000,"errmsg":"keywords not in content"}', "refused errcode 310000"),
        ("dingtalk", 200, b"<html>", "its answer is not that of such a service"),
        ("dingtalk", 200, b"[]", "its answer is not that of such a service"),
    ],
)
def test_a_yes_is_what_the_service_calls_one(shape: str, status: int, body: bytes, reason: str) -> None:
    assert refusal(Webhook("h", shape, URL), Reply(status, {}, body)) == reason


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("30", 30.0), ("", None), ("soon", None), ("9" * 50, None), ("²", None), ("-1", None)],
)
def test_a_service_may_say_when_to_come_back(said: str, seconds: float | None) -> None:
    assert retry_after(Reply(429, {"retry-after": said}, b"")) == seconds


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "generic"])
def test_no_message_is_longer_than_a_chat_takes(shape: str) -> None:
    news = [Told("refresh-failing", "x" * 5_000, NOW - 60, NOW) for _ in range(600)]
    body = rendered(shape, *news, chat_id="1")[1]
    (text,) = [one for one in (body.get("text"), body.get("content")) if one is not None]
    assert len(text if isinstance(text, str) else next(iter(text.values()))) <= 4_000
