"""What befell an account, in words for a person.

The pool and the keeper note it in short, `path proxy` or `refresh invalid_grant`: a kind and a
code. A text that is no such pair is a sentence already and is returned as it is; a code that we
do not know stays readable.
"""

from codex_proxy.accounts.account import Cause
from codex_proxy.errors import Verdict
from codex_proxy.net import NetKind

_BY_VERDICT: dict[str, str] = {
    Verdict.UNAUTHORIZED.value: "its access token was refused",
    Verdict.EXHAUSTED.value: "its usage limit was reached",
    Verdict.UNENTITLED.value: "its plan, credits or workspace do not allow it",
    Verdict.LIMITED.value: "it was asked too fast",
    Verdict.OVERLOADED.value: "the backend had no room",
    Verdict.SERVER.value: "the backend broke",
    Verdict.FORBIDDEN.value: "the backend refused it",
    Verdict.PATH.value: "the backend could not be reached",
    Verdict.SILENT.value: "the backend gave no answer in time",
    Verdict.CUT.value: "the answer was cut off",
}

_BY_CODE: dict[str, str] = {
    # On the way, `NetKind`.
    NetKind.CONNECT.value: "no connection",
    NetKind.DNS.value: "the name of the host was not found",
    NetKind.PROXY.value: "the proxy failed",
    NetKind.TLS.value: "no TLS connection",
    NetKind.TIMEOUT.value: "no answer in time",
    NetKind.CUT.value: "the connection was cut",
    # Of an exchange, `RefreshFailure`.
    "passing": "the issuer could not be asked, or had a bad moment",
    "uncertain": "the issuer's answer was lost on its way",
    "limited": "the issuer wants to be asked more seldom",
    "permanent": "the issuer has ended the login",
    "refused": "the issuer refused the login",
    # Of the issuer.
    "refresh_token_reused": "its refresh token was used before, perhaps by another program",
    "refresh_token_expired": "its refresh token has expired",
    "refresh_token_invalidated": "the issuer has ended the login",
    "invalid_grant": "the issuer does not know its refresh token any more",
    "token_expired": "its login has expired",
    "app_session_terminated": "its session was ended at the issuer",
    # Of the backend.
    "usage_limit_reached": "its usage limit was reached",
    "rate_limit_exceeded": "it was asked too fast",
    "usage_not_included": "its plan does not include Codex",
    "insufficient_quota": "it has neither quota nor credits",
    "deactivated_workspace": "its workspace was deactivated",
    "workspace_owner_credits_depleted": "its workspace has no credits left",
    "workspace_member_credits_depleted": "its credits in the workspace are used up",
    "workspace_owner_usage_limit_reached": "its workspace has reached its limit",
    "workspace_member_usage_limit_reached": "it has reached its limit in the workspace",
}

_CAUSES = frozenset(cause.value for cause in Cause)

# Words of ours, which say no more than the sentence; the others can be searched for.
_OURS = frozenset(kind.value for kind in NetKind) | {
    "passing",
    "uncertain",
    "limited",
    "permanent",
    "refused",
}


def words(noted: str) -> str:
    """Return what was noted of an account as a sentence without its full stop."""
    if noted in _CAUSES:
        return noted
    kind, _, code = noted.partition(" ")
    if kind == "refresh" and code:
        return f"its token was not exchanged: {_reason(code)}"
    if kind in _BY_VERDICT and code and " " not in code:
        return _failure(kind, code)
    return _reason(noted)


def _failure(kind: str, code: str) -> str:
    said = _BY_VERDICT[kind]
    says_no_more = code in _OURS and kind != Verdict.PATH.value
    if code in {"None", kind} or says_no_more or _BY_CODE.get(code) == said:
        return said
    if code.isdigit():
        return f"{said} (status {code})"
    return f"{said} ({_BY_CODE[code] if code in _OURS else code})"


def _reason(noted: str) -> str:
    # What follows a code is a sentence of ours in brackets.
    code, _, rest = noted.partition(" ")
    kind, _, status = noted.partition(" ")
    if kind == "status" and status.isdigit():
        return f"the answer was a {status}"
    if code not in _BY_CODE or (rest and not rest.startswith("(")):
        return noted
    shown = _BY_CODE[code] if code in _OURS else f"{_BY_CODE[code]} ({code})"
    return f"{shown} {rest}".rstrip()
