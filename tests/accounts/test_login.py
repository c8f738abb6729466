"""Logging in: what the browser, the device and the issuer see, and every way it can go wrong."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest

from codex_proxy.accounts.login import (
    Callback,
    Invitation,
    account_file,
    browser_login,
    device_login,
)
from codex_proxy.accounts.oauth import (
    CLIENT_ID,
    Device,
    Fetch,
    Issuer,
    LoginFailed,
    NoAnswer,
    Pkce,
    RevokeFailed,
)
from codex_proxy.accounts.tokens import NewTokens, Secret, identity_of
from codex_proxy.config import Live, Settings
from codex_proxy.net import NetError, Outbound
from codex_proxy.net.http import NetKind, Reply
from codex_proxy.protocol.wire import dumps, loads
from codex_proxy.simulator import Simulator
from codex_proxy.tasks import Background
from tests.accounts.making import NOW, jwt


class Place:
    """A simulated issuer, somebody who logs in, and a browser."""

    def __init__(self, sim: Simulator, outbound: Outbound, background: Background) -> None:
        self.sim = sim
        self.background = background
        self.issuer = Issuer(outbound.fetch, sim.issuer, "codex_proxy", "codex-proxy/test")
        self.browser = aiohttp.ClientSession()
        self.slept: list[float] = []
        self.invited: asyncio.Future[Invitation] = asyncio.get_running_loop().create_future()

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0.001)

    def begin(self, **more: Any) -> "asyncio.Task[str]":
        """Begin a browser login; its result is the e-mail address of who logged in."""
        values = {
            "ports": (0,),
            "sleep": self.sleep,
            "invite": self.invited.set_result,
            "accept": who,
            **more,
        }
        accept = values.pop("accept")
        return self.background.spawn(browser_login(self.issuer, accept, **values), name="login")

    async def visit(self, url: str, **headers: str) -> tuple[int, str]:
        """Open a page as a browser does, redirects followed."""
        async with self.browser.get(url, headers=headers) as answer:
            return answer.status, await answer.text()

    async def returns_to(self, url: str) -> str:
        """Return the address to which the issuer sends the browser, without going there."""
        async with self.browser.get(url, allow_redirects=False) as answer:
            assert answer.status == 302, await answer.text()
            return answer.headers["location"]


def who(tokens: NewTokens) -> str:
    return identity_of(tokens.id or "", tokens.access or "").email or ""


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    outbound, background = Outbound(Live(Settings())), Background()
    async with Simulator(3) as sim:
        here = Place(sim, outbound, background)
        yield here
        await here.browser.close()
        await background.aclose()
        await outbound.aclose()


@contextlib.contextmanager
def occupied(count: int) -> Iterator[list[int]]:
    """Hold *count* ports of this machine."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        yield [one.getsockname()[1] for one in held]


# --- in a browser


async def test_a_browser_login_brings_the_tokens_and_tells_the_browser(place: Place) -> None:
    login = place.begin()
    invitation = await place.invited
    status, page = await place.visit(invitation.url)
    assert await login == "a1@example.com"
    assert (status, "Logged in" in page) == (200, True)
    (exchange,) = place.sim.exchanges
    assert exchange.headers["content-type"] == "application/x-www-form-urlencoded"
    form = parse_qs(exchange.body.decode())
    assert set(form) == {"grant_type", "client_id", "code", "redirect_uri", "code_verifier"}
    assert form["redirect_uri"] == [invitation.redirect_uri]
    # Nothing waits on the port any more.
    with pytest.raises(aiohttp.ClientConnectionError):
        await place.visit(invitation.redirect_uri)


async def test_the_address_asks_for_what_the_codex_cli_asks_for(place: Place) -> None:
    login = place.begin()
    invitation = await place.invited
    address = urlsplit(invitation.url)
    query = {name: values[0] for name, values in parse_qs(address.query).items()}
    challenge, state = query.pop("code_challenge"), query.pop("state")
    assert (len(challenge), len(state)) == (43, 43)
    assert f"{address.scheme}://{address.netloc}{address.path}" == f"{place.sim.issuer}/oauth/authorize"
    port = urlsplit(invitation.redirect_uri).port
    assert query == {
        "response_type": "code",
        "client_id": CLIENT_ID,
        "redirect_uri": f"http://127.0.0.1:{port}/auth/callback",
        "scope": "openid profile email offline_access api.connectors.read api.connectors.invoke",
        "code_challenge_method": "S256",
        "id_token_add_organizations": "true",
        "codex_cli_simplified_flow": "true",
        "originator": "codex_proxy",
    }
    login.cancel()


def test_no_two_logins_share_a_secret() -> None:
    one, other = Pkce.new(), Pkce.new()
    assert one.verifier != other.verifier
    assert len(one.verifier.reveal()) == 86
    assert one.verifier.reveal() not in repr(one)


@pytest.mark.parametrize(
    "query", ["code=stolen&state=guess", "code=stolen", "error=access_denied&state=x", ""]
)
async def test_who_does_not_know_the_state_is_refused_and_ends_nothing(place: Place, query: str) -> None:
    login = place.begin()
    invitation = await place.invited
    status, page = await place.visit(f"{invitation.redirect_uri}?{query}")
    assert (status, "State mismatch" in page) == (400, True)
    assert not login.done()
    await place.visit(invitation.url)
    assert await login == "a1@example.com"


async def test_an_answer_without_a_code_ends_nothing(place: Place) -> None:
    login = place.begin()
    invitation = await place.invited
    state = parse_qs(urlsplit(invitation.url).query)["state"][0]
    status, page = await place.visit(f"{invitation.redirect_uri}?state={state}")
    assert (status, "no code in it" in page) == (400, True)
    assert not login.done()
    await place.visit(invitation.url)
    await login


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("access_denied", "the login was refused on the issuer's page"),
        ("missing_codex_entitlement", "this account may not use Codex: its plan or its workspace"),
        ("temporarily_unavailable", "the issuer refused the login: temporarily_unavailable: The login ended"),
    ],
)
async def test_a_refused_login_is_told_in_words_here_and_in_the_browser(
    place: Place, error: str, words: str
) -> None:
    place.sim.issuer_state.login_error = error
    login = place.begin()
    status, page = await place.visit((await place.invited).url)
    with pytest.raises(LoginFailed) as caught:
        await login
    assert caught.value.message.startswith(words)
    assert status == 400
    assert "Not logged in" in page
    assert not place.sim.exchanges


async def test_a_page_of_the_issuer_cannot_write_into_ours(place: Place) -> None:
    place.sim.issuer_state.login_error = "<script>alert(1)</script>"
    login = place.begin()
    _, page = await place.visit((await place.invited).url)
    assert "<script>" not in page
    with pytest.raises(LoginFailed):
        await login


async def test_an_account_that_is_not_wanted_is_refused_in_the_browser_too(place: Place) -> None:
    def accept(tokens: NewTokens) -> str:
        raise LoginFailed("that is another account")

    login = place.begin(accept=accept)
    status, page = await place.visit((await place.invited).url)
    with pytest.raises(LoginFailed, match="another account"):
        await login
    assert (status, "That is another account." in page) == (400, True)


async def test_a_page_that_is_loaded_twice_is_answered_twice(place: Place) -> None:
    gate = asyncio.Event()

    class Slow(Outbound):
        async def fetch(self, *args: Any, **more: Any) -> Reply:
            await gate.wait()
            return await super().fetch(*args, **more)

    outbound = Slow(Live(Settings()))
    place.issuer = Issuer(outbound.fetch, place.sim.issuer, "codex_proxy", "codex-proxy/test")
    login = place.begin()
    address = await place.returns_to((await place.invited).url)
    async with asyncio.TaskGroup() as group:
        visits = [group.create_task(place.visit(address)) for _ in range(2)]
        await asyncio.sleep(0.02)
        gate.set()
    assert [visit.result()[0] for visit in visits] == [200, 200]
    await login
    await outbound.aclose()
    assert len(place.sim.exchanges) == 1


async def test_a_code_that_the_issuer_does_not_take_is_told(place: Place) -> None:
    login = place.begin()
    invitation = await place.invited
    state = parse_qs(urlsplit(invitation.url).query)["state"][0]
    await place.visit(f"{invitation.redirect_uri}?code=ac_never_issued&state={state}")
    with pytest.raises(LoginFailed, match="authorization code is unknown or used") as caught:
        await login
    assert "ac_never_issued" not in str(caught.value)


async def test_who_takes_too_long_is_told(place: Place) -> None:
    login = place.begin(limit=0.02)
    await place.invited
    with pytest.raises(LoginFailed, match=r"nobody logged in within 0\.02 seconds"):
        await login


async def test_a_login_that_is_broken_off_answers_the_browser_and_lets_go_of_its_port(place: Place) -> None:
    async def never(*args: Any, **more: Any) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    place.issuer = Issuer(never, place.sim.issuer, "codex_proxy", "codex-proxy/test")
    login = place.begin()
    invitation = await place.invited
    visit = place.background.spawn(place.visit(invitation.url), name="visit")
    await asyncio.sleep(0.05)
    login.cancel()
    status, page = await visit
    assert (status, "The login was broken off." in page) == (400, True)
    with pytest.raises(asyncio.CancelledError):
        await login
    with socket.create_server(("127.0.0.1", urlsplit(invitation.redirect_uri).port or 0)):
        pass


# --- ports


async def test_the_second_port_serves_when_the_first_is_taken(place: Place) -> None:
    with occupied(1) as (taken,):
        login = place.begin(ports=(taken, 0))
        invitation = await place.invited
        assert urlsplit(invitation.redirect_uri).port != taken
        await place.visit(invitation.url)
        assert await login == "a1@example.com"


async def test_without_a_port_the_login_says_what_to_do(place: Place) -> None:
    with (
        occupied(2) as ports,
        pytest.raises(LoginFailed, match=rf"{ports[0]} and {ports[1]} on 127\.0\.0\.1 are in use.*--device"),
    ):
        await place.begin(ports=ports)
    assert not place.invited.done()


async def test_without_a_port_a_typed_answer_still_works(place: Place) -> None:
    with occupied(2) as ports:
        login = place.begin(ports=ports, can_type=True)
        invitation = await place.invited
        assert not invitation.is_listening
        assert urlsplit(invitation.redirect_uri).port == ports[0]
        assert invitation.offer(await place.returns_to(invitation.url)) == ""
        assert await login == "a1@example.com"


async def test_an_earlier_login_gives_way(place: Place) -> None:
    first = place.begin()
    port = urlsplit((await place.invited).redirect_uri).port
    place.invited = asyncio.get_running_loop().create_future()
    second = place.begin(ports=(port,))
    with pytest.raises(LoginFailed, match="another login on this machine took the place"):
        await first
    invitation = await place.invited
    assert urlsplit(invitation.redirect_uri).port == port
    await place.visit(invitation.url)
    assert await second == "a1@example.com"


@pytest.mark.parametrize("header", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://example.com"}])
async def test_a_web_page_cannot_end_a_login(place: Place, header: dict[str, str]) -> None:
    login = place.begin()
    invitation = await place.invited
    status, _ = await place.visit(invitation.redirect_uri.replace("/auth/callback", "/cancel"), **header)
    assert status == 403
    assert not login.done()
    await place.visit(invitation.url)
    await login


# --- typed


@pytest.mark.parametrize(
    "typed",
    [
        "{address}",
        '  "{address}"\r\n',
        "{query}",
        "code={code}&state={state}",
        "?{query}",
        "{code}",
        "{code}#{state}",
    ],
)
async def test_what_a_person_types_is_taken_in_every_form(place: Place, typed: str) -> None:
    login = place.begin(can_type=True)
    invitation = await place.invited
    address = await place.returns_to(invitation.url)
    query = urlsplit(address).query
    parts = {name: values[0] for name, values in parse_qs(query).items()}
    assert invitation.offer(typed.format(address=address, query=query, **parts)) == ""
    assert await login == "a1@example.com"


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ("", "nothing was typed"),
        ("hello there", "no address with a code in it"),
        ("http://127.0.0.1:1455/auth/callback", "no address with a code in it"),
        ("https://auth.example/oauth/authorize?client_id=x&state=y", "answer to another login"),
        (
            "http://127.0.0.1:1455/auth/callback?code=ac_1234567890123456789&state=other",
            "answer to another login",
        ),
        ("ac_1234567890123456789#other", "of another login"),
        ("код", "no address with a code in it"),
    ],
)
async def test_what_is_typed_wrongly_is_told_and_ends_nothing(
    place: Place, typed: str, complaint: str
) -> None:
    login = place.begin(can_type=True)
    invitation = await place.invited
    assert complaint in invitation.offer(typed)
    await asyncio.sleep(0)
    assert not login.done()
    await place.visit(invitation.url)
    await login


async def test_a_typed_refusal_counts(place: Place) -> None:
    place.sim.issuer_state.login_error = "access_denied"
    login = place.begin(can_type=True)
    invitation = await place.invited
    assert invitation.offer(await place.returns_to(invitation.url)) == ""
    with pytest.raises(LoginFailed, match="refused on the issuer's page"):
        await login


# --- on another device


async def device(place: Place, act: Callable[[Device], None], **more: Any) -> str:
    return await device_login(place.issuer, who, invite=act, sleep=place.sleep, **more)


async def test_a_device_login_waits_for_a_person(place: Place) -> None:
    def act(told: Device) -> None:
        assert told.url == f"{place.sim.issuer}/codex/device"
        place.sim.issuer_state.device_polls = 3

    assert await device(place, act) == "a1@example.com"
    # The interval comes as a text.
    assert place.slept == [5.0] * 4
    start, *polls, exchange = [r for r in place.sim.requests if r.method == "POST"]
    assert (start.path, start.json) == ("/api/accounts/deviceauth/usercode", {"client_id": CLIENT_ID})
    assert {poll.path for poll in polls} == {"/api/accounts/deviceauth/token"}
    assert set(polls[0].json) == {"device_auth_id", "user_code"}
    form = parse_qs(exchange.body.decode())
    assert form["redirect_uri"] == [f"{place.sim.issuer}/deviceauth/callback"]


async def test_another_person_approves(place: Place) -> None:
    assert (
        await device(place, lambda told: place.sim.approve_device(told.user_code, "a2")) == "a2@example.com"
    )


async def test_a_device_that_asks_too_often_asks_more_seldom(place: Place) -> None:
    def act(told: Device) -> None:
        place.sim.issuer_state.device_slow_down = 2
        place.sim.approve_device(told.user_code)

    await device(place, act)
    assert place.slept == [5.0, 10.0, 15.0]


async def test_an_issuer_without_device_logins_says_so(place: Place) -> None:
    place.sim.issuer_state.device_enabled = False
    with pytest.raises(LoginFailed, match="does not offer device logins"):
        await device(place, lambda _: None)


async def test_a_person_may_refuse_a_device_login(place: Place) -> None:
    def act(_: Device) -> None:
        place.sim.issuer_state.login_error = "access_denied"

    with pytest.raises(LoginFailed, match="refused on the issuer's page"):
        await device(place, act)


async def test_a_code_that_nobody_enters_expires(place: Place) -> None:
    with pytest.raises(LoginFailed, match="was not entered within"):
        await device(place, lambda _: None, limit=0.05)


class Script:
    """An issuer that answers from a list."""

    def __init__(self, *answers: tuple[int, object] | NetError) -> None:
        self.answers = list(answers)

    async def fetch(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout: float,
        proxy_url: str | None = None,
    ) -> Reply:
        answer = self.answers.pop(0)
        if isinstance(answer, NetError):
            raise answer
        return Reply(answer[0], {}, dumps(answer[1]))

    def issuer(self) -> Issuer:
        fetch: Fetch = self.fetch
        return Issuer(fetch, "https://auth.example/", "codex_proxy", "codex-proxy/test")


START = (200, {"device_auth_id": "dev_1", "usercode": "AB-12", "interval": 3})
PENDING = (404, {"detail": "not found"})
GRANT = (200, {"authorization_code": "ac_1", "code_verifier": "v_1", "code_challenge": "c"})
TOKENS = (200, {"access_token": "at", "refresh_token": "rt", "id_token": "id"})
LOST = NetError(NetKind.CUT, "the connection to auth.example was lost")


async def scripted(*answers: tuple[int, object] | NetError) -> list[float]:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    await device_login(Script(*answers).issuer(), who, invite=lambda _: None, sleep=sleep)
    return slept


async def test_bad_moments_of_the_issuer_are_waited_out() -> None:
    bad: list[Any] = [LOST, (503, {}), PENDING, LOST, (429, {})]
    assert await scripted(START, *bad, GRANT, TOKENS) == [3.0, 3.0, 3.0, 3.0, 3.0, 8.0]


async def test_an_issuer_that_stays_away_ends_a_device_login() -> None:
    with pytest.raises(NoAnswer):
        await scripted(START, *[LOST] * 5)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(500, {})], "the issuer answered 500"),
        ([LOST], "the issuer did not answer"),
        ([(200, {"user_code": "A"})], "holds no code"),
        ([(200, [])], "holds no code"),
        ([START, (400, {"error": "invalid_grant"})], "invalid_grant"),
        ([START, (200, {"authorization_code": "x"})], "lacks the code"),
        ([START, GRANT, (200, {"access_token": "at", "id_token": "id"})], "lacks tokens"),
        ([START, GRANT, (400, {"error": {"message": "no ac_1-like thing", "code": "bad_code"}})], "bad_code"),
    ],
)
async def test_an_answer_of_no_use_ends_it_in_words(answers: list[Any], words: str) -> None:
    with pytest.raises(LoginFailed, match=words):
        await scripted(*answers)


@pytest.mark.parametrize(
    ("interval", "seconds"),
    [("5", 5.0), (7, 7.0), (0, 1.0), ("0", 1.0), ("3600", 60.0), ("soon", 5.0), (None, 5.0), ("nan", 5.0)],
)
async def test_the_interval_is_read_as_it_comes(interval: object, seconds: float) -> None:
    start = (200, {"device_auth_id": "dev_1", "user_code": "AB-12", "interval": interval})
    assert await scripted(start, GRANT, TOKENS) == [seconds]


# --- what a login leaves


def test_a_new_file_has_the_shape_of_the_go_daemon_s() -> None:
    said = {"https://api.openai.com/auth": {"chatgpt_user_id": "user-x", "chatgpt_account_id": "acc-x"}}
    access = jwt(exp=int(NOW) + 3600, **said)
    tokens = NewTokens(Secret(access), Secret("rt_x"), Secret(jwt(email="x@example.com", **said)))
    file = account_file(tokens, now=NOW)
    assert file == {
        "type": "codex",
        "email": "x@example.com",
        "account_id": "acc-x",
        "access_token": access,
        "refresh_token": "rt_x",
        "id_token": tokens.id.reveal() if tokens.id else "",
        "expired": "2027-01-15T09:00:00.000Z",
        "last_refresh": "2027-01-15T08:00:00.000Z",
    }


@pytest.mark.parametrize(("expires_in", "expired"), [(60.0, "2027-01-15T08:01:00.000Z"), (None, "")])
def test_the_end_of_a_token_that_does_not_say_it_is_the_answer_s(
    expires_in: float | None, expired: str
) -> None:
    said = {"https://api.openai.com/auth": {"chatgpt_user_id": "user-x", "chatgpt_account_id": "acc-x"}}
    tokens = NewTokens(Secret("opaque"), Secret("rt_x"), Secret(jwt(**said)), expires_in)
    assert account_file(tokens, now=NOW)["expired"] == expired


def test_tokens_of_nobody_make_no_file() -> None:
    with pytest.raises(LoginFailed, match="do not say whose they are"):
        account_file(NewTokens(Secret("a"), Secret("b"), Secret("c")), now=NOW)


# --- the end of a login


async def test_revoke_ends_the_login_at_the_issuer(place: Place) -> None:
    tokens = place.sim.account("a1").tokens
    await place.issuer.revoke(Secret(tokens.refresh), "refresh_token")
    (request,) = [r for r in place.sim.requests if r.path == "/oauth/revoke"]
    assert loads(request.body) == {
        "token": tokens.refresh,
        "token_type_hint": "refresh_token",
        "client_id": CLIENT_ID,
    }
    assert tokens.login.revoked


async def test_a_revoke_that_did_not_happen_is_told(place: Place) -> None:
    place.sim.issuer_state.revoke_status = 503
    with pytest.raises(RevokeFailed, match="bad day"):
        await place.issuer.revoke(Secret(place.sim.account("a1").tokens.refresh), "refresh_token")
    with pytest.raises(RevokeFailed, match="did not answer"):
        await Script(LOST).issuer().revoke(Secret("at"), "access_token")


async def test_an_echoed_token_is_taken_out() -> None:
    answer = (400, {"error": {"message": "cannot revoke rt_0123456789"}})
    with pytest.raises(RevokeFailed) as caught:
        await Script(answer).issuer().revoke(Secret("rt_0123456789"), "refresh_token")
    assert "rt_0123456789" not in str(caught.value)


async def test_a_port_that_cannot_be_opened_at_all_is_told() -> None:
    callback = Callback("state-of-this-login")

    async def sleep(_: float) -> None: ...

    with pytest.raises(LoginFailed, match="no port for the browser"), occupied(1) as ports:
        await callback.open(ports, sleep)
    await callback.aclose()
