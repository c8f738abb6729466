"""The two keys: what fits, what is said of what does not, and that no address is ever shown."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from codex_proxy.config import Settings, Webhook, load, masked
from codex_proxy.errors import ConfigError

SECRET = "T0KEN-very-secret"
SLACK = f"https://hooks.slack.example/services/{SECRET}"


def settings(folder: Path, environ: dict[str, str] | None = None, **keys: Any) -> Settings:
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({k.replace("_", "-"): v for k, v in keys.items()}), encoding="utf-8")
    return load(file, environ or {}).settings


def refused(folder: Path, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(folder, **keys)
    return caught.value.message


def test_a_url_alone_is_a_generic_webhook(tmp_path: Path) -> None:
    assert settings(tmp_path, alert_webhooks=[SLACK]).alert_webhooks == (
        Webhook("generic-1", "generic", SLACK),
    )
    assert settings(tmp_path, alert_webhooks=SLACK).alert_webhooks == (
        Webhook("generic-1", "generic", SLACK),
    )


def test_a_mapping_says_more(tmp_path: Path) -> None:
    hooks = settings(
        tmp_path,
        alert_webhooks=[
            {"url": SLACK, "shape": "slack"},
            {"url": SLACK, "shape": "telegram", "chat-id": -100123, "name": "family"},
            {"url": SLACK, "shape": "dingtalk", "secret": SECRET},
        ],
    ).alert_webhooks
    assert hooks == (
        Webhook("slack-1", "slack", SLACK),
        Webhook("family", "telegram", SLACK, chat_id="-100123"),
        Webhook("dingtalk-3", "dingtalk", SLACK, secret=SECRET),
    )
    assert SECRET not in repr(hooks)


@pytest.mark.parametrize("source", ["file", "variable", "variable of a file"])
def test_the_list_may_lie_elsewhere(tmp_path: Path, source: str) -> None:
    text = f"- {{url: '{SLACK}', shape: slack}}\n- {{url: 'https://b.example/x', shape: feishu}}\n"
    file = tmp_path / "hooks"
    file.write_text(text, encoding="utf-8")
    if source == "file":
        made = settings(tmp_path, alert_webhooks_file=str(file))
    elif source == "variable":
        made = settings(tmp_path, {"CODEX_PROXY_ALERT_WEBHOOKS": text})
    else:
        made = settings(tmp_path, {"CODEX_PROXY_ALERT_WEBHOOKS_FILE": str(file)})
    assert [hook.shape for hook in made.alert_webhooks] == ["slack", "feishu"]


def test_check_shows_where_and_not_how(tmp_path: Path) -> None:
    shown = masked(settings(tmp_path, alert_webhooks=[{"url": SLACK, "shape": "slack"}]))
    assert shown["alert-webhooks"] == [
        {"name": "slack-1", "shape": "slack", "url": "https://hooks.slack.example"}
    ]
    assert SECRET not in repr(shown)


@pytest.mark.parametrize(
    ("hooks", "said"),
    [
        (5, "not a list"),
        ([5], "entry 1 is neither a URL nor a mapping"),
        ([{"shape": "slack"}], "entry 1 has no url"),
        ([{"url": SLACK, "shape": "irc"}], "entry 1: shape is none of generic, slack"),
        ([{"url": SLACK, "chat_id": "5"}], "entry 1 has 'chat_id', which is none of url"),
        (
            [SLACK, {"url": SLACK, "shape": "telegram"}],
            "entry 2: telegram, and no other shape, has a chat-id",
        ),
        ([{"url": SLACK, "chat-id": 5}], "entry 1: telegram, and no other shape, has a chat-id"),
        ([{"url": SLACK, "secret": SECRET}], "entry 1: feishu and dingtalk may have a secret"),
        ([{"url": SLACK, "name": "a/b"}], "entry 1: name is not"),
        ([{"url": SLACK, "name": "a"}, {"url": SLACK, "name": "a"}], "entry 2: the name 'a' is there twice"),
        ([f"ftp://x/{SECRET}"], "entry 1: url is no http or https URL"),
        ([f"https://user:{SECRET}@x/"], "entry 1: url has a user, a password or a fragment"),
        ([f"https://x/ {SECRET}"], "entry 1: url has a space or a control character in it"),
        ([f"http://chat.example/{SECRET}"], "entry 1: url is plain http"),
        ([f"http://8.8.8.8/{SECRET}"], "entry 1: url is plain http"),
        ([f"http://169.254.169.254/{SECRET}"], "entry 1: url is plain http"),
        ([f"https://x/{n}" for n in range(21)], "more than 20"),
    ],
)
def test_what_does_not_fit_is_named_and_not_shown(tmp_path: Path, hooks: Any, said: str) -> None:
    message = refused(tmp_path, alert_webhooks=hooks)
    assert re.search(r"config\.yaml:\d+: alert-webhooks = \*\*\*: ", message)
    assert said in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/x",
        "http://localhost/x",
        "http://[::1]/x",
        "http://10.1.2.3/x",
        "http://[fd00::1]/x",
    ],
)
def test_plain_http_may_be_near(tmp_path: Path, url: str) -> None:
    assert settings(tmp_path, alert_webhooks=[url]).alert_webhooks[0].url == url


def test_alerts_have_defaults_that_can_be_changed_one_by_one(tmp_path: Path) -> None:
    made = settings(tmp_path, alerts={"error-share": {"above": "5%"}, "refresh-failing": False}).alerts
    assert made == {
        "pool-nearly-dry": {"left": 0.1, "for": 300.0},
        "account-needs-login": {"for": 60.0},
        "error-share": {"above": 0.05, "requests": 20, "for": 120.0},
    }
    assert masked(settings(tmp_path, alerts={"error-share": "off"}))["alerts"] == {
        **Settings().alerts,
        "error-share": "off",
    }


@pytest.mark.parametrize(
    ("alerts", "said"),
    [
        ([], "not a mapping"),
        ({"pool": {}}, "'pool' is no alert"),
        ({"error-share": 5}, "error-share is neither off nor a mapping"),
        ({"error-share": {"over": 5}}, "error-share has 'over', which is none of above, requests, for"),
        ({"error-share": {"above": 5}}, "error-share: above is 5: not a share"),
        ({"error-share": {"above": "120%"}}, "error-share: above is '120%': not a share"),
        ({"error-share": {"above": "none"}}, "not a share"),
        ({"error-share": {"requests": 0}}, "error-share: requests is 0: out of range"),
        ({"pool-nearly-dry": {"for": "soon"}}, "pool-nearly-dry: for is 'soon': not a time"),
        ({5: {}}, "5 is no alert"),
    ],
)
def test_a_wrong_alert_is_named(tmp_path: Path, alerts: Any, said: str) -> None:
    assert said in refused(tmp_path, alerts=alerts)
