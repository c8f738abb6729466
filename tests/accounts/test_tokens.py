"""Tokens keep to themselves, and say whose they are."""

import base64
import copy
import dataclasses
import json
import pickle
from typing import Any

import orjson
import pytest

from codex_proxy.accounts.tokens import (
    AUTH_CLAIM,
    PROFILE_CLAIM,
    Identity,
    NewTokens,
    Secret,
    claims,
    expiry_of,
    identity_of,
    mask_email,
    mask_name,
    seconds_of,
    word_of,
)

SECRET = "rt_canary-of-the-mine"


def jwt(**payload: Any) -> str:
    body = base64.urlsafe_b64encode(orjson.dumps(payload)).decode().rstrip("=")
    return f"eyJhbGciOiJub25lIn0.{body}.sig"


@dataclasses.dataclass
class Holder:
    secret: Secret


@pytest.mark.parametrize(
    "shown",
    [
        repr(Secret(SECRET)),
        str(Secret(SECRET)),
        f"{Secret(SECRET)}",
        f"{Secret(SECRET)!r:>40}",
        f"{Secret(SECRET):>40}",
        f"{Secret(SECRET):.3}",
        "%s %r" % (Secret(SECRET), Secret(SECRET)),  # noqa: UP031 -- the way logging formats
        repr(Holder(Secret(SECRET))),
        repr([Secret(SECRET)]),
        repr(NewTokens(Secret(SECRET), Secret(SECRET), Secret(SECRET))),
        Secret(SECRET).digest(),
    ],
)
def test_a_secret_does_not_show_itself(shown: str) -> None:
    assert shown
    assert "canary" not in shown
    assert "rt_" not in shown


def test_a_secret_is_revealed_by_name_only() -> None:
    assert Secret(SECRET).reveal() == SECRET


def test_a_secret_does_not_leave_by_accident() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret(SECRET))
    with pytest.raises(TypeError):
        json.dumps({"token": Secret(SECRET)})
    with pytest.raises(TypeError):
        orjson.dumps(Holder(Secret(SECRET)))
    assert copy.deepcopy(Holder(Secret(SECRET))).secret == Secret(SECRET)


def test_secrets_compare_by_what_they_hold() -> None:
    assert Secret("a") == Secret("a")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a"), Secret("b")}) == 2
    assert Secret("\ud800") != Secret("é")
    assert bool(Secret("a"))
    assert not Secret()
    assert Secret("a").digest() == Secret("a").digest() != Secret("b").digest()
    assert Secret().digest() == ""


def test_claims_are_read_without_padding_and_without_signature() -> None:
    for length in range(4):
        assert claims(jwt(sub="x" * length)) == {"sub": "x" * length}
    assert claims(Secret(jwt(sub="y"))) == {"sub": "y"}


@pytest.mark.parametrize(
    "token",
    [
        "",
        "rt_opaque",
        "a.b",
        "a.b.c",
        "a..c",
        "a.b.c.d",
        "a.\u00e9.c",
        "a.bnVsbA.c",
        "a.WzFd.c",
        "a." + "W" * 9999 + ".c",
    ],
)
def test_what_is_no_jwt_claims_nothing(token: str) -> None:
    assert claims(token) == {}
    assert expiry_of(token) is None
    assert identity_of(token, token) == Identity()


def test_the_id_token_names_the_account() -> None:
    auth = {
        "chatgpt_user_id": "user-1",
        "user_id": "user-2",
        "chatgpt_account_id": "acc-1",
        "chatgpt_plan_type": "plus",
        "chatgpt_account_is_fedramp": True,
    }
    identity = identity_of(jwt(email="jane@example.com", **{AUTH_CLAIM: auth}), jwt())
    assert identity == Identity("user-1", "acc-1", "jane@example.com", "plus", True, None)


def test_the_access_token_fills_what_the_id_token_lacks() -> None:
    access = jwt(**{
        AUTH_CLAIM: {"user_id": "user-2", "chatgpt_account_id": "other", "chatgpt_data_residency": "eu"},
        PROFILE_CLAIM: {"email": "jane@example.com"},
    })
    identity = identity_of(jwt(**{AUTH_CLAIM: {"chatgpt_account_id": "acc-1"}}), access)
    assert identity == Identity("user-2", "acc-1", "jane@example.com", None, False, "eu")


@pytest.mark.parametrize(
    ("auth", "account_id"),
    [
        ({"chatgpt_account_id": "a", "organization_id": "b"}, "a"),
        ({"organization_id": "b", "organizations": [{"id": "c"}]}, "b"),
        ({"organizations": [{"id": "c"}, {"id": "d"}]}, "c"),
        ({"organizations": []}, None),
        ({"organizations": [7]}, None),
        ({"chatgpt_account_id": 7}, None),
        ({"chatgpt_account_id": "two\r\nlines"}, None),
    ],
)
def test_an_account_id_is_looked_for_in_order(auth: dict[str, Any], account_id: str | None) -> None:
    assert identity_of(jwt(**{AUTH_CLAIM: auth}), "").account_id == account_id


@pytest.mark.parametrize(
    ("auth", "residency"),
    [
        ({"chatgpt_compute_residency": "us", "chatgpt_data_residency": "eu"}, "us"),
        ({"chatgpt_compute_residency": "no_constraint"}, None),
        ({}, None),
    ],
)
def test_residency_is_told_only_when_it_constrains(auth: dict[str, Any], residency: str | None) -> None:
    assert identity_of("", jwt(**{AUTH_CLAIM: auth})).residency == residency


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1_800_000_000, 1_800_000_000.0), (1.5, 1.5), (0, None), (-1, None), (True, None), ("1", None), (None, None),
     (float("nan"), None), (float("inf"), None), (10**400, None)],
)  # fmt: skip
def test_a_time_is_a_number_that_can_be_one(value: object, expected: float | None) -> None:
    assert seconds_of(value) == expected


def test_an_access_token_says_when_it_ends() -> None:
    assert expiry_of(jwt(exp=1_800_000_000)) == 1_800_000_000.0
    assert expiry_of(jwt(exp="soon")) is None


def test_a_word_can_go_into_a_header() -> None:
    assert word_of(" acc-1\n") == "acc-1"
    for value in ("", "a b", "a\nb", "é", "a\0", 7, None):
        assert word_of(value) is None


@pytest.mark.parametrize(
    ("email", "masked"),
    [
        ("jane.doe@example.com", "j***@e***.com"),
        ("a@b.co.uk", "a***@b***.co.uk"),
        ("a@localhost", "a***@l***"),
        ("nobody", "***"),
        ("@x.y", "***"),
        ("", ""),
    ],
)
def test_an_email_is_masked(email: str, masked: str) -> None:
    assert mask_email(email) == masked


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("jane.doe@example.com.json", "j***@e***.com.json"),
        ("codex-jane@example.com-plus.json", "c***@e***.com-plus.json"),
        ("work.json", "work.json"),
        ("jane@host", "j***@h***"),
        ("auth.json", "auth.json"),
    ],
)
def test_a_file_name_shows_no_email(name: str, masked: str) -> None:
    assert mask_name(name) == masked


def test_an_identity_shows_no_email() -> None:
    assert "jane" not in repr(Identity("user-1", "acc-1", "jane@example.com", "plus"))
