"""The hub's page: devices, rounds, accuracy by release, releases, refusals; read-only.

Reads the tables through views; sets one cookie at login with the admin token.
Never runs a script or loads a style from elsewhere; never shows a secret.
Source: CSP Level 3; RFC 6265bis (SameSite, __Host- prefix).
"""

import hashlib
import hmac
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs, quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud_hub import plot, views
from cloud_hub.context import Context, bounded_body, same_secret
from cloud_hub.registry import NotFoundError

COOKIE = "__Host-wardround"
ROWS_SHOWN = 12  # of rounds, releases and refusals on the first page
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class SecurityHeaders:
    """ASGI middleware: the same headers on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, with_headers if scope["type"] == "http" else send)


def routes(context: Context) -> list[BaseRoute]:
    pages = _Pages(context)
    return [
        Route("/", pages.page(pages.overview, "overview.html")),
        Route("/devices", pages.page(pages.devices, "devices.html")),
        Route("/devices/{device}", pages.page(pages.device, "device.html")),
        Route("/rounds", pages.page(pages.rounds, "rounds.html")),
        Route("/rounds/{round_id}", pages.page(pages.round, "round.html")),
        Route("/releases", pages.page(pages.releases, "releases.html")),
        Route("/releases/{release_version:int}", pages.page(pages.release, "release.html")),
        Route("/refusals", pages.page(pages.refusals, "refusals.html")),
        Route("/login", pages.login_form),
        Route("/login", pages.login, methods=["POST"]),
        Route("/logout", pages.logout, methods=["POST"]),
    ]


class _Pages:
    """One method per page gives what its template shows."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._age_s = context.config.rollout.heartbeat_max_age_s
        self._templates = Environment(
            loader=PackageLoader("cloud_hub"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._templates.filters.update(when=_when, bytes=_bytes, percent=_percent, short=lambda digest: digest[:12])
        self._templates.globals.update(bar=plot.bar_svg)

    # --- pages

    def overview(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        devices = views.devices(session, now=now, max_age_s=self._age_s)
        ticks, lines = plot.lines(views.accuracy_by_release(session))
        rounds, releases = views.rounds(session), views.releases(session)
        return {
            "devices": devices,
            "online": sum(device["state"] == "online" for device in devices),
            "alarms": [(device["device"], alarm) for device in devices for alarm in device["alarms"]],
            "sites": views.sites(session),
            "rounds": rounds[:ROWS_SHOWN],
            "releases": releases[:ROWS_SHOWN],
            "refusals": views.refusals(session, limit=ROWS_SHOWN),
            "plot": plot.accuracy_svg(ticks, lines),
            "plot_table": (ticks, lines),
        }

    def devices(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        return {"devices": views.devices(session, now=now, max_age_s=self._age_s)}

    def device(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        return {"device": views.device(session, request.path_params["device"], now=now, max_age_s=self._age_s)}

    def rounds(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        return {"rounds": views.rounds(session)}

    def round(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        found = views.round_(session, request.path_params["round_id"])
        made = found["release_version"]
        return {"round": found, "release": views.release(session, made) if made is not None else None}

    def releases(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        return {"releases": views.releases(session)}

    def release(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        return {"release": views.release(session, request.path_params["release_version"])}

    def refusals(self, session: Session, request: Request, now: float) -> dict[str, Any]:
        return {"refusals": views.refusals(session, limit=1000)}

    # --- around each page

    def page(self, gather: Callable[[Session, Request, float], dict[str, Any]], template: str) -> Any:
        def endpoint(request: Request) -> Response:
            now = self._context.clock()
            if not cookie_is_good(request.cookies.get(COOKIE, ""), self._context.admin_token, now=now):
                return RedirectResponse(f"/login?next={quote(request.url.path)}", status_code=303)
            try:
                with self._context.database.reading() as session:
                    values = gather(session, request, now)
            except NotFoundError as error:
                raise HTTPException(404, str(error)) from error
            return self._render(template, path=request.url.path, now=now, **values)

        return endpoint

    def login_form(self, request: Request) -> Response:
        return self._render("login.html", next=local_path(request.query_params.get("next", "/")), wrong=False)

    async def login(self, request: Request) -> Response:
        form = parse_qs((await bounded_body(request, 4096)).decode("utf-8", "replace"))
        return await run_in_threadpool(self._login, form.get("token", [""])[0].strip(), form.get("next", ["/"])[0])

    def _login(self, token: str, wanted: str) -> Response:
        now = self._context.clock()
        if not same_secret(token, self._context.admin_token):
            self._context.strangers.refused(device="", what="login", reason="wrong admin token at the hub page")
            return self._render("login.html", status=401, next=local_path(wanted), wrong=True)
        hours = self._context.config.https.session_hours
        answer = RedirectResponse(local_path(wanted), status_code=303)
        cookie = make_cookie(self._context.admin_token, expires_at=now + hours * 3600)
        answer.set_cookie(COOKIE, cookie, max_age=hours * 3600, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    def logout(self, request: Request) -> Response:
        answer = RedirectResponse("/login", status_code=303)
        answer.delete_cookie(COOKIE, path="/", secure=True, httponly=True, samesite="strict")
        return answer

    def _render(self, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(**values), status_code=status)


def make_cookie(admin_token: str, *, expires_at: float) -> str:
    """`EXPIRES.MAC`: a new admin token ends all logins."""
    expires = str(int(expires_at))
    return f"{expires}.{_mac(admin_token, expires)}"


def cookie_is_good(cookie: str, admin_token: str, *, now: float) -> bool:
    expires, _, mac = cookie.partition(".")
    return same_secret(mac, _mac(admin_token, expires)) and int(expires) > now


def local_path(wanted: str) -> str:
    """Where to go after login: a path of this page, nothing else."""
    return wanted if wanted.startswith("/") and not wanted.startswith(("//", "/\\")) and wanted.isprintable() else "/"


def _mac(admin_token: str, expires: str) -> str:
    return hmac.new(admin_token.encode(), b"wardround hub page:" + expires.encode(), hashlib.sha256).hexdigest()


# --- how values read ------------------------------------------------------------------------------


def _when(unix_s: float | None, now: float) -> str:
    """`12 s ago`, `in 3 days`; a date beyond a month."""
    if unix_s is None:
        return "never"
    away_s = abs(now - unix_s)
    if away_s > 31 * 86400:
        return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")
    for size_s, unit in ((86400, "day"), (3600, "h"), (60, "min"), (1, "s")):
        if away_s >= size_s:
            count = int(away_s // size_s)
            text = f"{count} {unit}{'s' if unit == 'day' and count > 1 else ''}"
            return f"{text} ago" if unix_s <= now else f"in {text}"
    return "now"


def _bytes(size: int | None) -> str:
    if size is None:
        return "–"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{fraction:.0%}"
