"""The admin API: its table, its document, what it refuses, and what it does to the ledger."""

import contextlib
import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import ValidationError
from openapi_spec_validator import validate

from codex_proxy.clock import ManualClock
from codex_proxy.config import Live, Settings
from codex_proxy.errors import ProxyError, RequestError
from codex_proxy.ledger.keys import digest_of, is_well_formed
from codex_proxy.server.gateway import performing
from codex_proxy.server.gateway.desk import Desk
from codex_proxy.server.gateway.operations import BASE, OPERATIONS, Operation, perform, segment_of
from codex_proxy.server.gateway.routes import GATEWAY_ROUTES, GATEWAY_UI_ROUTES
from tests.server.desks import DOCUMENT, NOW, desk, holds

# -- the table and the document -----------------------------------------------------------


def test_the_document_is_one() -> None:
    validate(DOCUMENT)
    assert DOCUMENT["openapi"] == "3.1.0"


def test_every_operation_is_in_the_document_and_nothing_else() -> None:
    told = {
        (method.upper(), path.removeprefix(BASE))
        for path, methods in DOCUMENT["paths"].items()
        for method in methods
    }
    assert told == {(one.method, one.path) for one in OPERATIONS if not one.is_alias}
    names = [methods[method]["operationId"] for methods in DOCUMENT["paths"].values() for method in methods]
    assert len(names) == len(set(names))


def test_every_operation_is_served_to_whoever_has_the_admin_key_and_to_the_page() -> None:
    served = {(route.method, route.path) for route in GATEWAY_ROUTES}
    assert served == {(one.method, f"{BASE}{one.path}") for one in OPERATIONS}
    page = {
        (route.method, route.path.removeprefix("/ui/api/admin"))
        for route in GATEWAY_UI_ROUTES
        if route.path.startswith("/ui/")
    }
    assert page == {(one.method, one.path) for one in OPERATIONS}
    assert {route.level.value for route in GATEWAY_ROUTES} == {"admin"}


@pytest.mark.parametrize("one", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
def test_every_operation_says_what_it_takes_and_gives(one: Operation) -> None:
    query, body, answer = performing.types_of(one)
    assert query is not Any
    assert body is not Any
    assert answer is not Any
    if not one.has_body:
        assert body.__name__ == "Nothing"
    first = next(other for other in OPERATIONS if other.method == one.method and _fits(other, one))
    assert first is one, f"{first.path} stands before it and takes its place"


def _fits(other: Operation, one: Operation) -> bool:
    return segment_of(other.path, one.path.replace("{", "a").replace("}", "z")) is not None


@pytest.mark.parametrize("one", OPERATIONS, ids=lambda one: f"{one.method} {one.path}")
async def test_without_a_ledger_it_says_what_to_set(one: Operation) -> None:
    bare = Desk(Live(Settings()), ManualClock())
    path = one.path.replace("{", "").replace("}", "")
    if not one.needs_ledger and one.path != "/upstreams":
        return
    method = "POST" if one.path == "/upstreams" else one.method
    body = b'{"name": "a", "base_url": "http://127.0.0.1:1"}'
    with pytest.raises(RequestError) as caught:
        await perform(bare, method, path, query={}, body=body, actor="a")
    assert (caught.value.status, caught.value.code) == (404, "ledger_off")
    assert "ledger: personal" in caught.value.message


# -- what is refused ----------------------------------------------------------------------


MISFITS: list[tuple[Any, str | None, str]] = [
    ({}, "name", "missing required field"),
    ({"name": 7}, "name", "expected 'str'"),
    ({"name": ""}, "name", "length >= 1"),
    ({"name": " \t"}, "name", "can be seen"),
    ({"name": "x" * 101}, "name", "length <= 100"),
    ({"name": "a", "balance": "5"}, "balance", "unknown field"),
    ({"name": "a", "limits": {"concurrency": 0}}, "limits.concurrency", ">= 1"),
    ({"name": "a", "limits": {"concurrency": 1.5}}, "limits.concurrency", "expected 'int"),
    ({"name": "a", "limits": {"concurrency": True}}, "limits.concurrency", "expected 'int"),
    ({"name": "a", "limits": {"rpm": 5}}, "limits.rpm", "unknown field"),
    ({"name": "a", "limits": {"endpoints": ["all"]}}, "limits.endpoints.0", "invalid enum value 'all'"),
    ({"name": "a", "limits": {"networks": ["10.0.0.0/40"]}}, "limits.networks.0", "no address"),
    ({"name": "a", "limits": {"budgets": [{"window": "year", "amount": "1"}]}}, "limits.budgets.0.window", "invalid enum"),
    ({"name": "a", "limits": {"budgets": [{"window": "day", "amount": 5}]}}, "limits.budgets.0.amount", "expected 'str'"),
    ({"name": "a", "limits": {"budgets": [{"window": "day", "amount": "five"}]}}, "limits.budgets.0.amount", "no amount of dollars"),
    ({"name": "a", "limits": {"budgets": [{"window": "day", "amount": "0"}]}}, "limits.budgets.0.amount", "more than 0"),
    ({"name": "a", "limits": {"budgets": [{"window": "day", "amount": "9999999999"}]}}, "limits.budgets.0.amount", "nine billion"),
    ({"name": "a", "limits": {"budgets": [{"window": "day", "amount": "1"}] * 2}}, "limits.budgets.1.window", "already"),
    (b"[]", None, "expected 'object'"),
    (b"{", None, "not JSON"),
    (b"\xff\xfe", None, "not JSON"),
    (b'{"name": "\xff"}', None, "not JSON"),
    (b"[" * 100_000, None, ""),
]  # fmt: skip
"""A body, the field that is to be named, and some of what is to be said."""


async def test_what_does_not_fit_is_refused_and_its_field_named(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        for body, param, words in MISFITS:
            status, found, message = await api.refusal("POST", "/users", body)
            assert (status, found) == (400, param), body
            assert words in message
        assert [user["id"] for user in (await api.ask("GET", "/users"))["users"]] == ["owner"]


MISSES: list[tuple[str, dict[str, str], str]] = [
    ("/usage", {"limit": "0"}, "limit"),
    ("/usage", {"limit": "501"}, "limit"),
    ("/usage", {"limit": "ten"}, "limit"),
    ("/usage", {"since": "yesterday"}, "since"),
    ("/usage", {"since": "2026-01-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"}, "until"),
    ("/usage", {"sinse": "1"}, "sinse"),
    ("/usage", {"before": "nowhere"}, "before"),
    ("/usage/sums", {"by": "colour"}, "by"),
    ("/usage/sums.csv", {"by": "key;day"}, "by"),
    ("/entries", {"user": "nobody"}, "user"),
    ("/keys", {"status": "lost"}, "status"),
    ("/audit", {"before": "-1"}, "before"),
    ("/audit", {"target": "a\ud800"}, "target"),
    ("/audit", {"\x00": "a"}, "\\x00"),
]


async def test_a_query_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        for path, query, param in MISSES:
            status, found, _ = await api.refusal("GET", path, **query)
            assert (status, found) == (400, param), query


NONSENSE: list[Any] = [
    None, True, 0, -1, 2**63, 10**30, 1.5, 1e308, "", "a", "\ud800", "\x00", "a\x00b", "\u2028", "'; DROP TABLE users;--",
    "x" * 5000, "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "2027-01-01T00:00:00Z", "9000000000", "-1",
    "0.0000000001", "1e5", "5h", "day", "active", "standard", "owner", [], [[]], {}, {"a": 1}, ["a"], [None],
    [{"window": "5h", "amount": "9000000000"}], {"input": "1", "output": "2"},
]  # fmt: skip


async def test_nonsense_breaks_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    async with desk(tmp_path) as api:
        ids = [(await api.key(await api.user("ann", "5")))["key"]["id"], "owner", "1", "²", "x" * 5000]
        for one in OPERATIONS * 20:
            if "upstreams" in one.path:
                continue
            query, body, _ = performing.types_of(one)
            asked = {field: str(rng.choice(NONSENSE)) for field in _fields(query) if rng.random() < 0.5}
            said = {field: rng.choice(NONSENSE) for field in _fields(body) if rng.random() < 0.85}
            raw = json.dumps(said).encode() if one.has_body else b""
            with contextlib.suppress(ProxyError):
                await one.perform(api.desk, rng.choice(ids), asked, raw, "tester")
        assert (await api.ask("POST", "/ledger/check"))["ok"]


def _fields(kind: Any) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind)]


async def test_who_is_not_there_is_a_404(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        for method, path, body in (
            ("GET", "/users/user_0", None),
            ("PATCH", "/users/user_0", {"name": "b"}),
            ("GET", "/users/user_0/entries", None),
            ("POST", "/users/user_0/credit", {"amount": "1", "reason": "r", "idempotency_key": "k"}),
            ("GET", "/keys/key_0", None),
            ("POST", "/keys/key_0/revoke", None),
            ("POST", "/keys/key_0/rotate", None),
            ("GET", "/usage/req_0", None),
            ("DELETE", "/prices/7", None),
            ("DELETE", "/prices/seven", None),
            ("GET", "/nowhere", None),
        ):
            assert (await api.refusal(method, path, body))[0] == 404, path
        # In a body it is a field.
        assert (await api.refusal("POST", "/keys", {"user": "user_0", "name": "a"}))[:2] == (400, "user")


# -- users and money ----------------------------------------------------------------------


async def test_a_user_has_limits_a_balance_and_a_history(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        limits = {
            "requests_per_minute": 60,
            "budgets": [{"window": "day", "amount": "2.5"}],
            "models": ["gpt-5*"],
            "networks": ["192.0.2.7", "2001:db8::/32"],
        }
        user = await api.user("Ana  Lima", limits=limits)
        assert (user["name"], user["balance"], user["is_billed"]) == ("Ana Lima", "0.00", True)
        assert user["limits"]["budgets"] == [{"window": "day", "amount": "2.50"}]
        assert user["limits"]["networks"] == ["192.0.2.7/32", "2001:db8::/32"]
        path = f"/users/{user['id']}"
        paid = {"amount": "10.000000001", "reason": "first", "idempotency_key": "one"}
        first = await api.ask("POST", f"{path}/credit", paid)
        assert (first["amount"], first["balance_after"], first["actor"]) == (
            "10.000000001",
            "10.000000001",
            "tester",
        )
        # The same once more changes nothing; the same key for something else is a mistake.
        assert await api.ask("POST", f"{path}/credit", paid) == first
        assert (await api.refusal("POST", f"{path}/credit", {**paid, "amount": "11"}))[:2] == (
            409,
            "idempotency_key",
        )
        taken = {"amount": "-4.5", "reason": "too much", "idempotency_key": "two"}
        await api.ask("POST", f"{path}/adjust", taken)
        assert (
            await api.refusal("POST", f"{path}/adjust", {**taken, "amount": "-9", "idempotency_key": "3"})
        )[:2] == (409, "amount")
        assert (
            await api.refusal("POST", f"{path}/credit", {**paid, "amount": "-1", "idempotency_key": "4"})
        )[:2] == (400, "amount")
        assert (await api.refusal("POST", f"{path}/adjust", {**paid, "amount": "0", "idempotency_key": "5"}))[
            :2
        ] == (400, "amount")
        assert (await api.refusal("POST", f"{path}/adjust", {**paid, "reason": " ", "idempotency_key": "6"}))[
            :2
        ] == (400, "reason")
        assert (await api.ask("GET", path))["balance"] == "5.500000001"
        page = await api.ask("GET", f"{path}/entries", limit="1")
        assert [one["kind"] for one in page["entries"]] == ["adjust"]
        rest = await api.ask("GET", f"{path}/entries", limit="1", before=page["next"])
        assert ([one["kind"] for one in rest["entries"]], rest["next"]) == (["credit"], None)
        assert (await api.ask("POST", "/ledger/check")) == {"ok": True, "problems": []}


async def test_a_change_leaves_alone_what_it_does_not_name(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        user = await api.user(limits={"concurrency": 3})
        path = f"/users/{user['id']}"
        assert (await api.ask("PATCH", path, {"status": "suspended"}))["limits"]["concurrency"] == 3
        assert (await api.ask("PATCH", path, {"limits": {}}))["limits"]["concurrency"] is None
        assert (await api.ask("PATCH", path, {}))["status"] == "suspended"
        assert (await api.refusal("PATCH", "/users/owner", {"status": "suspended"}))[:2] == (400, "status")
        names = [one["name"] for one in (await api.ask("GET", "/users", status="suspended"))["users"]]
        assert names == ["ann"]
        assert (await api.refusal("POST", "/users", {"name": "ann"}))[:2] == (409, "name")


async def test_personal_users_pay_nothing_unless_they_are_to(tmp_path: Path) -> None:
    async with desk(tmp_path, "personal") as api:
        assert (await api.user("a"))["is_billed"] is False
        assert (await api.user("b", is_billed=True))["is_billed"] is True


# -- keys ---------------------------------------------------------------------------------


async def test_a_key_is_told_once(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        user = await api.user()
        made = await api.key(user, expires_at="2027-06-01T00:00:00+02:00")
        secret, key = made["secret"], made["key"]
        assert is_well_formed(secret)
        found = api.desk.ledger.directory.key_by_digest(digest_of(secret))
        assert found is not None
        assert found.id == key["id"]
        assert (key["user"], key["status"], key["expires_at"]) == ("ann", "active", "2027-05-31T22:00:00Z")
        for method, path in (("GET", "/keys"), ("GET", f"/keys/{key['id']}"), ("GET", "/audit")):
            told = json.dumps(await api.ask(method, path))
            assert secret not in told
            assert digest_of(secret).hex() not in told
        assert (
            await api.refusal(
                "POST", "/keys", {"user": user["id"], "name": "b", "expires_at": "2020-01-01T00:00:00Z"}
            )
        )[:2] == (400, "expires_at")
        assert (
            await api.refusal(
                "POST", "/keys", {"user": user["id"], "name": "b", "expires_at": "2027-06-01T00:00:00"}
            )
        )[:2] == (400, "expires_at")


async def test_a_key_is_replaced_and_ended(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        user = await api.user()
        made = await api.key(user)
        path = f"/keys/{made['key']['id']}"
        directory = api.desk.ledger.directory
        rotated = await api.ask("POST", f"{path}/rotate", {"grace_seconds": 60})
        assert rotated["key"]["id"] == made["key"]["id"]
        assert rotated["secret"] != made["secret"]
        for text in (made["secret"], rotated["secret"]):
            assert directory.key_by_digest(digest_of(text)) is not None
        api.clock.advance(61)
        assert directory.key_by_digest(digest_of(made["secret"])) is None
        await api.ask("POST", f"{path}/rotate", {})
        assert directory.key_by_digest(digest_of(rotated["secret"])) is None
        assert (await api.ask("POST", f"{path}/revoke"))["status"] == "revoked"
        assert (await api.refusal("POST", f"{path}/rotate"))[0] == 409
        assert (await api.ask("GET", "/keys", status="active"))["keys"] == []
        assert len((await api.ask("GET", "/keys", status="revoked", user=user["id"], q="LAP"))["keys"]) == 1


async def test_of_many_those_are_told_that_fit(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        user = await api.user()
        for name in ("one", "two", "three"):
            await api.key(user, name)
            api.clock.advance(1)
        found = await api.ask("GET", "/keys", limit="2")
        assert ([key["name"] for key in found["keys"]], found["total"]) == (["three", "two"], 3)
        found = await api.ask("GET", "/users", limit="1")
        assert ([one["name"] for one in found["users"]], found["total"]) == (["ann"], 2)


async def test_a_key_past_its_time_is_told_so(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        made = await api.key(await api.user(), expires_at="2027-06-01T00:00:00Z")
        api.clock.advance(366 * 86_400)
        assert [key["status"] for key in (await api.ask("GET", "/keys", status="expired"))["keys"]] == [
            "expired"
        ]
        path = f"/keys/{made['key']['id']}"
        assert (await api.ask("PATCH", path, {"name": "again"}))["expires_at"] == "2027-06-01T00:00:00Z"
        assert (await api.ask("PATCH", path, {"expires_at": None}))["status"] == "active"


# -- usage --------------------------------------------------------------------------------

DAY = 86_400.0


async def test_usage_is_told_row_by_row_and_added_up(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        ann, bob = await api.user("ann", "5"), await api.user("bob", "0.000001")
        laptop, phone, editor = await api.key(ann), await api.key(ann, "phone"), await api.key(bob, "editor")
        await api.spend(laptop, "r1", 1_000_000, ago=DAY)
        await api.spend(laptop, "r2", 2_000_000, model="gpt-5-mini")
        await api.spend(phone, "r3", None)
        # It costs more than there is.
        await api.spend(editor, "r4", 3_000)
        page = await api.ask("GET", "/usage", limit="3")
        assert [row["request_id"] for row in page["usage"]] == ["r4", "r3", "r2"]
        assert [
            row["request_id"] for row in (await api.ask("GET", "/usage", before=page["next"]))["usage"]
        ] == ["r1"]
        last, unpriced = page["usage"][0], page["usage"][1]
        assert (last["cost"], last["debit"], last["shortfall"], last["user"], last["key"]) == (
            "0.000003", "0.000001", "0.000002", "bob", "editor",
        )  # fmt: skip
        assert (unpriced["cost"], unpriced["debit"]) == (None, "0.00")
        sums = await api.ask("GET", "/usage/sums", by="user,key")
        assert [(one["user"], one["key"], one["turns"], one["cost"], one["unpriced"]) for one in sums["sums"]] == [
            ("ann", "laptop", 2, "0.003", 0), ("bob", "editor", 1, "0.000003", 0), ("ann", "phone", 1, "0.00", 1),
        ]  # fmt: skip
        assert (sums["total"]["turns"], sums["total"]["cost"], sums["total"]["shortfall"]) == (
            4,
            "0.003003",
            "0.000002",
        )
        days = await api.ask("GET", "/usage/sums", by="day", key=laptop["key"]["id"])
        assert [(one["day"], one["cost"]) for one in days["sums"]] == [
            ("2027-01-15", "0.002"),
            ("2027-01-14", "0.001"),
        ]
        assert days["by"] == ["day"]
        models = await api.ask("GET", "/usage/sums", by="model", since=str(int(NOW)), user=ann["id"])
        assert {one["model"] for one in models["sums"]} == {"gpt-5-mini", "gpt-5"}
        none = await api.ask("GET", "/usage/sums", until="2020-01-01T00:00:00Z")
        assert (none["sums"], none["total"]["turns"], none["total"]["cost"]) == ([], 0, "0.00")
        one = await api.ask("GET", "/usage/r2")
        assert (one["model"], one["prices"]["input"], one["attempts"]) == (
            "gpt-5-mini",
            "1.25",
            [{"target": "atelier", "outcome": "ok", "status": 200, "seconds": 1.5}],
        )
        assert (await api.ask("GET", f"/users/{bob['id']}"))["is_past_due"] is True


async def test_budgets_tell_how_they_stand(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        ann = await api.user("ann", "5", limits={"budgets": [{"window": "month", "amount": "4"}]})
        key = await api.key(
            ann, limits={"budgets": [{"window": "5h", "amount": "1"}, {"window": "total", "amount": "9"}]}
        )
        path = f"/keys/{key['key']['id']}/budgets"
        begun, total = (await api.ask("GET", path))["budgets"]
        # The five hours begin with the first use.
        assert (begun["spent"], begun["resets_at"], total["resets_at"]) == ("0.00", None, None)
        await api.spend(key, "r1", 1_250_000_000, ago=40 * DAY)
        await api.spend(key, "r2", 250_000_000)
        assert [one["spent"] for one in (await api.ask("GET", path))["budgets"]][1] == "1.50"
        (month,) = (await api.ask("GET", f"/users/{ann['id']}/budgets"))["budgets"]
        assert (month["of"], month["spent"], month["resets_at"]) == ("user", "0.25", "2027-02-01T00:00:00Z")
        assert (await api.ask("GET", "/users/owner/budgets"))["budgets"] == []


async def test_tables_for_a_spreadsheet_hold_no_formulas(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        key = await api.key(await api.user("=cmd|' /C calc'!A0", "5"), '+1, "2"\u2028')
        await api.spend(key, "r1", 1_500, model="-gpt", target="\uff1dsum")
        answered = await api.raw("GET", "/usage.csv")
        assert (answered.content_type, answered.file) == ("text/csv", "usage.csv")
        (row,) = csv.DictReader(io.StringIO(answered.body.decode()))
        assert (row["user"], row["model"], row["target"]) == ("'=cmd|' /C calc'!A0", "'-gpt", "'\uff1dsum")
        assert (row["cost"], row["prices"], row["at"]) == (
            "0.0000015",
            "input=1.25 output=10.00",
            "2027-01-15T08:00:00+00:00",
        )
        sums = (await api.raw("GET", "/usage/sums.csv", by="key,day")).body.decode()
        (row,) = csv.DictReader(io.StringIO(sums))
        assert (row["key_id"], row["day"], row["turns"]) == (key["key"]["id"], "2027-01-15", "1")
        assert "user" not in row


async def test_a_table_that_is_too_long_is_refused_and_never_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from codex_proxy.server.gateway import usage

    monkeypatch.setattr(usage, "_SLICE", 2)
    monkeypatch.setattr(usage, "MOST_CSV_ROWS", 4)
    async with desk(tmp_path) as api:
        key = await api.key(await api.user("ann", "5"))
        for number in range(7):
            await api.spend(key, f"r{number}", 1)
        with pytest.raises(RequestError, match="shorter span"):
            await api.raw("GET", "/usage.csv")
        monkeypatch.setattr(usage, "MOST_CSV_ROWS", 8)
        rows = list(csv.DictReader(io.StringIO((await api.raw("GET", "/usage.csv")).body.decode())))
        assert [row["request_id"] for row in rows] == [f"r{number}" for number in reversed(range(7))]


# -- prices -------------------------------------------------------------------------------


async def test_an_own_price_takes_the_packages_place_until_it_is_ended(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        before = await api.ask("GET", "/prices", model="gpt-5")
        assert {one["source"] for one in before["prices"]} == {"package"}
        own = await api.ask(
            "POST",
            "/prices",
            {
                "model": "gpt-5",
                "input": "1",
                "output": "2",
                "long": {"input": "3", "output": "4"},
                "long_above": 1000,
            },
        )
        assert own["price"] == {"input": "1.00", "cached": "1.00", "cache_write": "1.00", "output": "2.00"}
        (now,) = (await api.ask("GET", "/prices", model="gpt-5"))["prices"]
        assert (now["source"], now["input"], now["long"]["output"], now["long_above"]) == (
            "own",
            "1.00",
            "4.00",
            1000,
        )
        later = await api.ask(
            "POST",
            "/prices",
            {"model": "gpt-5", "input": "7", "output": "8", "effective_from": "2028-01-01T00:00:00Z"},
        )
        assert later["effective_from"] == "2028-01-01T00:00:00Z"
        (then,) = (await api.ask("GET", "/prices", model="gpt-5", at="2028-01-02T00:00:00Z"))["prices"]
        assert then["input"] == "7.00"
        await api.ask("DELETE", f"/prices/{later['id']}")
        await api.ask("DELETE", f"/prices/{own['id']}")
        after = await api.ask("GET", "/prices", model="gpt-5")
        assert after["prices"] == before["prices"]
        assert len(after["own"]) == 4
        for body, param in (
            ({"model": "gpt-5", "input": "1"}, "output"),
            ({"model": "gpt-5", "input": "-1", "output": "1"}, "input"),
            ({"model": "two words", "input": "1", "output": "1"}, "model"),
            ({"model": "m", "input": "1", "output": "1", "tier": "gold"}, "tier"),
            ({"model": "m", "input": "1", "output": "1", "long_above": 5}, "long_above"),
            ({"model": "m", "input": "1", "output": "1", "per_call": "1"}, "per_call"),
        ):
            assert (await api.refusal("POST", "/prices", body))[:2] == (400, param)


async def test_history_is_priced_again_after_a_look(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        ann = await api.user("ann", "5")
        key = await api.key(ann)
        await api.spend(key, "r1", 1_000_000, ago=60)
        await api.ask(
            "POST",
            "/prices",
            {"model": "gpt-5", "input": "10", "output": "0", "effective_from": "2027-01-01T00:00:00Z"},
        )
        span = {"since": "2027-01-01T00:00:00Z", "reason": "the price was wrong"}
        would = await api.ask("POST", "/prices/rerate", span)
        assert (would["dry_run"], would["changed"], would["before"], would["after"]) == (
            True,
            1,
            "0.001",
            "0.01",
        )
        assert (await api.ask("GET", f"/users/{ann['id']}"))["balance"] == "4.999"
        done = await api.ask("POST", "/prices/rerate", {**span, "dry_run": False})
        assert done["moved"] == [{"user_id": ann["id"], "user": "ann", "amount": "-0.009"}]
        assert (await api.ask("GET", f"/users/{ann['id']}"))["balance"] == "4.99"
        assert (await api.ask("POST", "/prices/rerate", {**span, "dry_run": False}))["changed"] == 0
        assert (await api.ask("POST", "/ledger/check"))["problems"] == []


# -- audit, status ------------------------------------------------------------------------


async def test_who_did_what_is_kept(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        user = await api.user("ann", "5")
        key = await api.key(user)
        await api.ask("PATCH", f"/keys/{key['key']['id']}", {"limits": {"concurrency": 2}})
        found = await api.ask("GET", "/audit", target=key["key"]["id"])
        assert [one["action"] for one in found["entries"]] == ["key.update", "key.create"]
        assert json.loads(found["entries"][0]["after"])["limits"] == {"concurrency": 2}
        first = await api.ask("GET", "/audit", limit="1")
        assert len((await api.ask("GET", "/audit", before=first["next"], actor="test"))["entries"]) == 3


async def test_the_ledger_says_how_it_does(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        await api.key(await api.user("ann", "5"))
        status = await api.ask("GET", "/ledger")
        assert (status["mode"], status["users"], status["keys"], status["balance"]) == (
            "billing",
            2,
            1,
            "5.00",
        )
        assert status["is_away"] is False


async def test_the_document_is_served(tmp_path: Path) -> None:
    async with desk(tmp_path) as api:
        assert await api.ask("GET", "/openapi.json") == json.loads(json.dumps(DOCUMENT))


def test_what_the_document_asks_for_is_what_is_decoded() -> None:
    """A body that fits its schema decodes, and one that does not is refused."""
    schema = DOCUMENT["paths"][f"{BASE}/keys"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    good = {
        "user": "u",
        "name": "n",
        "limits": {"budgets": [{"window": "5h", "amount": "1.5"}]},
        "expires_at": None,
    }
    holds(schema, good)
    operation = next(one for one in OPERATIONS if one.name == "create_key")
    _, kind, _ = performing.types_of(operation)
    assert performing.decode_body(json.dumps(good).encode(), kind).name == "n"
    for bad in (
        {**good, "extra": 1},
        {"user": "u"},
        {**good, "limits": {"budgets": [{"window": "5h", "amount": "x"}]}},
    ):
        with pytest.raises(ValidationError):
            holds(schema, bad)
        with pytest.raises(RequestError):
            performing.decode_body(json.dumps(bad).encode(), kind)
