"""EST over HTTPS, the box's side: one question, one answer, and what an answer must be.

Reads and writes nothing on disk; talks to the hub's HTTPS port.
Never follows what it is told elsewhere, and takes no reply larger than a hub's.
Source: EST, RFC 7030 sections 4.1 and 4.2; PKCS #7 certs-only, RFC 5272.
"""

import base64
import binascii
import ssl
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from fleet_link.errors import LinkError

MAX_REPLY_BYTES = 1024 * 1024
TIMEOUT_S = 20.0
CACERTS = "/.well-known/est/cacerts"
NEW_TOKEN = "ask for a new token on the hub: `fleet device token DEVICE`"  # noqa: S105 - advice, no secret


class RefusedError(LinkError):
    """The hub is there and says no: to ask again helps nothing."""


def tls(root: x509.Certificate) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=root.public_bytes(Encoding.PEM).decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def client(hub_url: str, context: ssl.SSLContext, auth: tuple[str, str] | None = None) -> httpx.Client:
    return httpx.Client(base_url=hub_url, verify=context, auth=auth, timeout=TIMEOUT_S, trust_env=False)


def certificate(hub: httpx.Client, csr_pem: bytes, operation: str) -> x509.Certificate:
    csr_der = x509.load_pem_x509_csr(csr_pem).public_bytes(Encoding.DER)
    headers = {"content-type": "application/pkcs10", "content-transfer-encoding": "base64"}
    reply = ask(hub, "POST", f"/.well-known/est/{operation}", content=base64.encodebytes(csr_der), headers=headers)
    return certificates(reply)[0]


def ask(hub: httpx.Client, method: str, url: str, **request: Any) -> bytes:
    """One request. Raises LinkError with what the hub said and what the operator does next."""
    try:
        with hub.stream(method, url, **request) as response:
            reply = b""
            for part in response.iter_bytes():
                reply += part
                if len(reply) > MAX_REPLY_BYTES:
                    raise LinkError("the hub's reply is larger than any reply of a hub", advice="check the address")
    except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
        advice = (
            "check the hub's address, the firewall and both clocks; nothing is used up, the same can be tried again"
        )
        raise LinkError(f"the hub cannot be reached: {error}", advice=advice) from error
    if response.status_code == httpx.codes.OK:
        return reply
    said = reply[:300].decode("utf-8", "replace").strip() or response.reason_phrase
    if response.status_code in (400, 401, 403, 404, 409, 410):
        raise RefusedError(f"the hub refused ({response.status_code}): {said}", advice=NEW_TOKEN)
    raise LinkError(f"the hub failed ({response.status_code}): {said}", advice="try the same again later")


def certificates(reply: bytes) -> list[x509.Certificate]:
    try:
        certificates = pkcs7.load_der_pkcs7_certificates(from_base64(reply.decode("ascii"), "certificates"))
    except (ValueError, TypeError) as error:
        raise LinkError(f"the hub's certificates are not understood: {error}", advice="check the address") from error
    if not certificates:
        raise LinkError("the hub sent no certificate", advice="check the address")
    return certificates


def from_base64(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise LinkError(f"the hub's {what} are not base64: {error}", advice="check the hub's address") from error
