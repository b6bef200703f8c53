"""The HTTPS listener: TLS in which a caller may show a certificate of this hub's CA, and the app sees it.

Reads the server's key and certificate with its intermediate, and the CA; puts what was shown into ASGI's extension `tls`.
Never asks a caller for a certificate, and never judges one further than its signature: its end is the route's matter.
Source: ASGI TLS extension 0.2 (client_cert_chain); X509_V_FLAG_NO_CHECK_TIME, openssl X509_VERIFY_PARAM_set_flags(3).
"""

import asyncio
import ssl
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cloud_hub.config import Paths

NO_CHECK_TIME = 0x200000  # a box that was away for months may still renew; the ssl module has no name for it


def settings(app: ASGIApp, paths: Paths, **options: Any) -> uvicorn.Config:
    """Loaded: `.ssl` holds what a renewed server certificate is loaded into."""
    made = uvicorn.Config(
        app,
        http=_ShowsCertificate,
        ssl_keyfile=paths.server_key,
        ssl_certfile=paths.server_certificate,
        ssl_ca_certs=str(paths.ca_certificate),
        ssl_cert_reqs=ssl.CERT_OPTIONAL,
        **options,
    )
    made.load()
    assert made.ssl is not None  # a key and a certificate were given
    made.ssl.verify_flags |= NO_CHECK_TIME
    return made


def shown_certificate(scope: Scope) -> bytes | None:
    """DER of the certificate that this connection's caller showed and holds the key of; None where it showed none."""
    chain = scope.get("extensions", {}).get("tls", {}).get("client_cert_chain", [])
    return ssl.PEM_cert_to_DER_cert(chain[0]) if chain else None


class _ShowsCertificate(H11Protocol):
    """uvicorn does not hand the peer's certificate on."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls: ssl.SSLObject = transport.get_extra_info("ssl_object")
        shown = tls.getpeercert(binary_form=True)
        if shown is not None:
            self.app = _with_certificate(self.app, ssl.DER_cert_to_PEM_cert(shown))


def _with_certificate(app: Any, certificate_pem: str) -> Any:
    async def with_certificate(scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("extensions", {})["tls"] = {"client_cert_chain": [certificate_pem]}
        await app(scope, receive, send)

    return with_certificate
