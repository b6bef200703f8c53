"""Enrolment token: the one line of text that an operator carries from the hub to a new box.

Reads and writes text.
Never checks whether the secret is still good: the hub's registry does, when the token is used.
Source: RFC 4648 chapter 5 (base64url), RFC 7030 (EST) for what it is used with.
"""

import base64
import binascii
from typing import Annotated

import msgspec
from msgspec import Meta

from fleet_link.errors import LinkError
from fleet_link.messages import Digest, Name
from fleet_link.topics import is_device_id

PREFIX = "wr1."
MAX_TOKEN_CHARACTERS = 2048


class EnrolmentToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`ca_sha256` pins the hub's CA before the first connection, so the box never trusts on first use."""

    device: Name
    hub_url: Annotated[str, Meta(max_length=300, pattern=r"^https://[A-Za-z0-9.\-\[\]:]+(/[A-Za-z0-9._~/-]*)?\Z")]
    ca_sha256: Digest  # of the CA certificate's DER bytes
    secret: Annotated[str, Meta(min_length=20, max_length=200, pattern=r"^[A-Za-z0-9_-]+\Z")]

    def text(self) -> str:
        return PREFIX + base64.urlsafe_b64encode(msgspec.json.encode(self)).rstrip(b"=").decode("ascii")


_decoder = msgspec.json.Decoder(EnrolmentToken)


def parse(text: str) -> EnrolmentToken:
    """Raises LinkError on anything `text()` would not have written, without repeating the secret."""
    text = text.strip()
    if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARACTERS:
        raise _not_a_token("it does not start with wr1. or is too long")
    encoded = text.removeprefix(PREFIX)
    try:
        token = _decoder.decode(base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise _not_a_token("it was cut or changed") from error
    if not is_device_id(token.device):
        raise _not_a_token(f"{token.device} cannot be a device's name")
    if token.text() != text:
        raise _not_a_token("it was cut or changed")
    return token


def _not_a_token(reason: str) -> LinkError:
    return LinkError(
        f"not an enrolment token: {reason}",
        advice="copy the whole line that `fleet device add` printed, or make a new token",
    )
