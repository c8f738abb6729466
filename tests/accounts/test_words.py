"""What befell an account, in words: pairs that the pool notes, and what it notes in other ways."""

import pytest

from codex_proxy.accounts.account import Cause
from codex_proxy.accounts.words import words


@pytest.mark.parametrize(
    ("noted", "said"),
    [
        ("", ""),
        ("path proxy", "the backend could not be reached (the proxy failed)"),
        ("path 403", "the backend could not be reached (status 403)"),
        ("path None", "the backend could not be reached"),
        ("exhausted usage_limit_reached", "its usage limit was reached"),
        ("server some_code", "the backend broke (some_code)"),
        ("silent timeout", "the backend gave no answer in time"),
        (
            "refresh refresh_token_invalidated",
            "its token was not exchanged: the issuer has ended the login (refresh_token_invalidated)",
        ),
        (
            "refresh passing",
            "its token was not exchanged: the issuer could not be asked, or had a bad moment",
        ),
        ("refresh strange_code", "its token was not exchanged: strange_code"),
        ("passing", "the issuer could not be asked, or had a bad moment"),
        (
            "invalid_grant (an exchange was cut off)",
            "the issuer does not know its refresh token any more (invalid_grant) (an exchange was cut off)",
        ),
        ("status 401", "the answer was a 401"),
        ("deactivated_workspace", "its workspace was deactivated (deactivated_workspace)"),
        # Sentences already.
        ("its file is not there", "its file is not there"),
        ("no usable token", "no usable token"),
        ("refused by hand", "refused by hand"),
        ("disabled", "disabled"),
        *((cause.value, cause.value) for cause in Cause),
    ],
)
def test_what_was_noted_is_said_in_words(noted: str, said: str) -> None:
    assert words(noted) == said
