"""HTML of the review page: templates, what they may call, and the headers every answer carries.

Reads edge_agent/templates; writes nothing.
Never lets a template print unescaped text, never allows a script, style or picture from elsewhere.
Source: Content Security Policy Level 3; OWASP Secure Headers Project.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.datastructures import MutableHeaders
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECURITY_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": (
            "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; form-action 'self'; "
            "base-uri 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        "Cache-Control": "no-store",  # patients' images and names stay out of the browser's disk cache
    }
)
TLS_HEADERS: Mapping[str, str] = MappingProxyType({"Strict-Transport-Security": "max-age=31536000"})


class SecurityHeaders:
    """ASGI middleware: adds SECURITY_HEADERS to every answer."""

    def __init__(self, app: ASGIApp, *, with_tls: bool) -> None:
        self._app = app
        self._headers = {**SECURITY_HEADERS, **(TLS_HEADERS if with_tls else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)


@dataclass(frozen=True)
class Pages:
    environment: Environment

    @classmethod
    def load(cls) -> "Pages":
        environment = Environment(
            loader=PackageLoader("edge_agent"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"clock": clock, "date": date, "percent": percent, "size": size, "words": words}
        return cls(environment)

    def html(self, template: str, status_code: int, /, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.environment.get_template(template).render(**values), status_code)


def clock(unix_s: float) -> str:
    """Local time of the box; today without the day, this year without the year."""
    moment, now = time.localtime(unix_s), time.localtime()
    form = "%H:%M:%S" if moment[:3] == now[:3] else "%d %b, %H:%M" if moment[0] == now[0] else "%d %b %Y, %H:%M"
    return time.strftime(form, moment)


def date(value: str) -> str:
    """A DICOM DA as 2026-11-24; anything else as it is. Source: PS3.5 section 6.2."""
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == 8 and value.isdecimal() else value


def percent(share: float) -> str:
    """Never 0 % or 100 % for what is neither."""
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1 else f"{share * 100:.0f} %"


def size(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.0f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"


def words(name: str) -> str:
    """A label or state name for the eye: `not-for-us` is `not for us`."""
    return name.replace("-", " ").replace("_", " ")
