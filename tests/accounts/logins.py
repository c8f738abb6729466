"""What credential files hold, in both shapes, made in a line."""

import base64
import json
from pathlib import Path
from typing import Any

import orjson

from codex_proxy.accounts.tokens import AUTH_CLAIM, NewTokens, Secret

NOW = 1_800_000_000.0
HOUR = 3_600.0


def jwt(**payload: Any) -> str:
    body = base64.urlsafe_b64encode(orjson.dumps(payload)).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{body}.sig"


def auth(user: str = "user-1", account: str = "acc-1", plan: str = "plus") -> dict[str, Any]:
    return {AUTH_CLAIM: {"chatgpt_user_id": user, "chatgpt_account_id": account, "chatgpt_plan_type": plan}}


def access(user: str = "user-1", account: str = "acc-1", *, ends: float = NOW + HOUR, n: int = 0) -> str:
    return jwt(exp=int(ends), n=n, **auth(user, account))


def flat(user: str = "user-1", account: str = "acc-1", **more: Any) -> dict[str, Any]:
    return {
        "access_token": access(user, account),
        "refresh_token": f"rt_{user}_{account}_1",
        "id_token": jwt(email=f"{user}@example.com", **auth(user, account)),
        "type": "codex",
        "expired": "2027-01-15T09:00:00Z",
        "last_refresh": "2027-01-15T08:00:00Z",
        **more,
    }


def codex(**more: Any) -> dict[str, Any]:
    return {
        "auth_mode": "chatgpt",
        "OPENAI_API_KEY": None,
        "tokens": {
            "id_token": jwt(email="jane@example.com", **auth()),
            "access_token": access(),
            "refresh_token": "rt_1",
            "account_id": "acc-1",
            "oauth_provenance": {"issuer": "https://auth.openai.com", "client_id": "app_x"},
            "login_owner_id": "MKyU",
        },
        "last_refresh": "2026-11-21T00:15:08.160630767Z",
        **more,
    }


def write(path: Path, content: object) -> Path:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_bytes())
    assert isinstance(document, dict)
    return document


def new_tokens(n: int = 2, *, ends: float = NOW + 10 * HOUR) -> NewTokens:
    return NewTokens(Secret(access(ends=ends, n=n)), Secret(f"rt_{n}"), Secret(jwt(n=n, **auth())))
