"""The line of text an operator carries: parsed strictly, never repeated in an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_link import tokens
from fleet_link.errors import LinkError
from fleet_link.tokens import EnrolmentToken

TOKEN = EnrolmentToken("box-1", "https://hub.example:8443", "a" * 64, "s3cret" * 5)


def test_text_and_back() -> None:
    text = TOKEN.text()
    assert text.startswith("wr1.")
    assert "=" not in text
    assert tokens.parse(text) == TOKEN
    assert tokens.parse(f"  {text}\n") == TOKEN  # as pasted


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "hub"},
        {"device": "Box 1"},
        {"device": ""},
        {"hub_url": "http://hub.example"},
        {"hub_url": "https://user:password@hub.example"},
        {"hub_url": "https://hub.example/?a=b"},
        {"hub_url": "https://hub.example/\n"},
        {"ca_sha256": "A" * 64},
        {"ca_sha256": "a" * 63},
        {"secret": "short"},
        {"secret": "s" * 300},
        {"secret": "s" * 30 + "\n"},
    ],
)
def test_refuses_each_wrong_field(changes: dict[str, str]) -> None:
    fields = {"device": "box-1", "hub_url": "https://h", "ca_sha256": "a" * 64, "secret": "s" * 30}
    tokens.parse(EnrolmentToken(**fields).text())
    with pytest.raises(LinkError, match="not an enrolment token") as refused:
        tokens.parse(EnrolmentToken(**(fields | changes)).text())
    assert "fleet device add" in refused.value.advice


def test_refuses_every_cut_and_every_changed_character_without_repeating_the_secret() -> None:
    text = TOKEN.text()
    for position in range(len(text)):
        for broken in (text[:position], text[:position] + "*" + text[position + 1 :], text + text[position]):
            with pytest.raises(LinkError) as refused:
                tokens.parse(broken)
            assert TOKEN.secret not in str(refused.value) + refused.value.advice


@given(st.text(max_size=300))
def test_random_text_is_refused(junk: str) -> None:
    for text in (junk, tokens.PREFIX + junk):
        with pytest.raises(LinkError):
            tokens.parse(text)


@given(
    device=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True).filter(lambda name: name != "hub"),
    secret=st.text("abcXYZ019-_", min_size=20, max_size=200),
    port=st.integers(1, 65535),
)
def test_every_valid_token_survives(device: str, secret: str, port: int) -> None:
    token = EnrolmentToken(device, f"https://hub.example:{port}/base", "0" * 64, secret)
    assert tokens.parse(token.text()) == token
