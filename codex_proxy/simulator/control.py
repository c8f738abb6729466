"""The control endpoint under /_sim: what tests do in process, people and other languages do here."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from codex_proxy.protocol.wire import BadJson, dumps, loads
from codex_proxy.simulator.faults import STATES
from codex_proxy.simulator.reply import WORDS
from codex_proxy.simulator.script import KINDS, Script

if TYPE_CHECKING:
    from codex_proxy.simulator.exchange import Received
    from codex_proxy.simulator.server import Simulator

# How a person's logins go; these are the issuer's.
_LOGINS = (
    "login_error",
    "device_enabled",
    "device_interval",
    "device_polls",
    "device_slow_down",
    "revoke_status",
)
_SETTINGS = ("strict", "wire", "latency", "extra_events", "full_output", "served_model", "login_as")


async def handle(sim: "Simulator", request: web.Request) -> web.Response:
    """Answer one control request; what is asked wrongly is a 400 that says what there is."""
    words = [word for word in request.path.split("/")[2:] if word]
    try:
        if request.method == "GET":
            return _get(sim, words, request)
        if request.method == "POST":
            raw = await request.read()
            body = loads(raw) if raw.strip() else {}
            return _json(_post(sim, words, body))
    except BadJson as exc:
        return _json({"error": f"the body is no JSON: {exc}"}, 400)
    except KeyError as exc:
        return _json({"error": f"there is no {exc}"}, 404)
    except (TypeError, ValueError, AttributeError) as exc:
        return _json({"error": str(exc)}, 400)
    return _json({"error": "GET or POST"}, 405)


def help_text(sim: "Simulator") -> str:
    """Return what the control endpoint offers."""
    url = sim.url
    return f"""The Codex backend, simulated.

  base-url      {sim.base_url}
  oauth-issuer  {sim.issuer}

  curl {url}/_sim/accounts                                     who there is, and how they are
  curl {url}/_sim/accounts/a1 -d '{{"state":"usage_limit","resets_in":60}}'
  curl {url}/_sim/accounts/a1 -d '{{"state":"ok"}}'
  curl {url}/_sim/accounts/a1 -d '{{"primary":97}}'              how full its windows are
  curl {url}/_sim/script -d '{{"kind":"tool","name":"shell","account":"a1"}}'
  curl {url}/_sim/advance -d '{{"seconds":3600}}'                move the clock
  curl {url}/_sim/requests?limit=5                             what was received
  curl {url}/_sim/settings -d '{{"wire":"any"}}'                 {", ".join(_SETTINGS)}
  curl {url}/_sim/device -d '{{"user_code":"ABCD-12345"}}'       approve a device login
  curl {url}/_sim/logins -d '{{"login_error":"access_denied"}}'  {", ".join(_LOGINS)}
  curl -X POST {url}/_sim/reset                                forget requests, scripts, states

states:  {", ".join(STATES)}
scripts: {", ".join(KINDS)}
words:   {", ".join("sim:" + word for word in WORDS)} (in the last user message)
"""


def _get(sim: "Simulator", words: list[str], request: web.Request) -> web.Response:
    match words:
        case []:
            return web.Response(text=help_text(sim))
        case ["accounts"]:
            return _json({"accounts": [_account(sim, account.name) for account in sim.accounts]})
        case ["accounts", name]:
            return _json(_account(sim, name))
        case ["requests"]:
            query = request.query
            found = [
                one
                for one in sim.requests
                if query.get("account") in {None, one.account} and query.get("path", "") in one.path
            ]
            limit = int(query.get("limit", "100"))
            return _json({"requests": [_received(sim, one) for one in found[-limit:]] if limit > 0 else []})
        case ["settings"]:
            return _json({name: getattr(sim, name) for name in _SETTINGS})
        case ["logins"]:
            return _json({name: getattr(sim.issuer_state, name) for name in _LOGINS})
        case _:
            return _json({"error": "there is no such page; GET /_sim lists them"}, 404)


def _post(sim: "Simulator", words: list[str], body: Any) -> Any:
    match words:
        case ["accounts", name]:
            return _change(sim, name, dict(body))
        case ["accounts"]:
            account = sim.add_account(**body)
            return _account(sim, account.name)
        case ["script"]:
            fields = body
            target: Any = sim
            if isinstance(body, dict) and "account" in body:
                fields = {key: value for key, value in body.items() if key != "account"}
                target = sim.account(str(body["account"]))
            target.script(Script.from_json(fields))
            return {"ok": True}
        case ["advance"]:
            sim.advance(float(body["seconds"]))
            return {"now": sim.now()}
        case ["settings"]:
            for name, value in body.items():
                if name not in _SETTINGS:
                    raise ValueError(f"unknown setting {name!r}; there are {', '.join(_SETTINGS)}")
                setattr(sim, name, value)
            return {name: getattr(sim, name) for name in _SETTINGS}
        case ["logins"]:
            for name, value in body.items():
                if name not in _LOGINS:
                    raise ValueError(f"unknown setting {name!r}; there are {', '.join(_LOGINS)}")
                setattr(sim.issuer_state, name, value)
            return {name: getattr(sim.issuer_state, name) for name in _LOGINS}
        case ["device"]:
            sim.approve_device(str(body["user_code"]), body.get("account"))
            return {"ok": True}
        case ["reset"]:
            sim.clear()
            return {"ok": True}
        case _:
            raise KeyError("/".join(words) or "such action")


def _change(sim: "Simulator", name: str, body: dict[str, Any]) -> Any:
    account = sim.account(name)
    actions: dict[str, Callable[[], object]] = {
        "expire_access": account.expire_access,
        "revoke_access": account.revoke_access,
        "expire_refresh": account.expire_refresh,
        "issue": account.issue,
    }
    primary, secondary = body.pop("primary", None), body.pop("secondary", None)
    if primary is not None or secondary is not None:
        account.use(primary, secondary)
    models = body.pop("models", None)
    if models is not None:
        account.models = [str(slug) for slug in models]
        for slug in account.models:
            account.add_family(slug)
    action = body.pop("action", None)
    if action is not None:
        if action not in actions:
            raise ValueError(f"unknown action {action!r}; there are {', '.join(actions)}")
        actions[action]()
    if "state" in body:
        account.set(str(body.pop("state")), times=body.pop("times", None), **body)
    elif body:
        raise ValueError(
            f"unknown field {', '.join(body)}; there are state, times, action, models, primary, secondary"
        )
    return _account(sim, name)


def _account(sim: "Simulator", name: str) -> dict[str, Any]:
    account = sim.account(name)
    fault = account.current_fault()
    return {
        "name": account.name,
        "plan": account.plan,
        "email": account.email,
        "account_id": account.account_id,
        "user_id": account.user_id,
        "state": account.state,
        "options": fault.options if fault is not None else {},
        "times": fault.times if fault is not None else None,
        "refresh": account.refresh_mode,
        "used_percent": account.used_percent,
        "models": account.models,
        "scripts": len(account.scripts),
        "turns": account.turns,
        "refreshes": account.tokens.login.refreshes,
        "access_expires_in": round(account.tokens.expires_at - sim.now()),
    }


def _received(sim: "Simulator", one: "Received") -> dict[str, Any]:
    # Somebody may try a client with a real login: what it sends as a secret is not shown.
    headers = [
        [name, f"<{one.account or 'unknown'}>" if name.lower() in {"authorization", "cookie"} else value]
        for name, value in one.headers.items()
    ]
    secret = one.path.startswith("/oauth/")
    return {
        "method": one.method,
        "path": one.path,
        "query": "<hidden>" if secret and one.query else one.query,
        "headers": headers,
        "account": one.account,
        "time": one.time,
        "status": one.status,
        "finished": one.finished,
        "cancelled": one.cancelled,
        "size": len(one.wire),
        "body": "<hidden>"
        if secret
        else one.json
        if one.json is not None
        else one.body.decode("utf-8", "replace"),
    }


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=dumps(value) + b"\n", status=status, content_type="application/json")
