"""The review page: radiologists see what the box found, and accept or correct it.

Reads the catalog, results and images; writes verdicts (through reviews). Every page has a JSON twin under /api.
Never answers anything but the login to a stranger, never loads anything from elsewhere, never logs a patient or a reviewer.
Source: ARCHITECTURE.md, "A correction becomes knowledge"; OWASP Secure Headers Project.
"""

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from http import HTTPStatus
from threading import Lock
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from edge_agent import catalog, database, reviews, users, worklist
from edge_agent.config import Config
from edge_agent.images import ImageError, Images, grey_png, heatmap_png
from edge_agent.pages import Pages, SecurityHeaders
from edge_agent.sessions import LoginThrottle, Session, Sessions, load_key
from fleet_link.errors import SiteError

log = logging.getLogger(__name__)

MAX_FORM_BYTES = 16_384
MAX_PAGE = 1_000_000
MAX_QUARANTINED = 1000
MAX_SERIES_NO = 2**62
_STATUS: Mapping[type[SiteError], int] = {
    reviews.OutdatedResultError: 409,
    reviews.UnknownSeriesError: 404,
    reviews.ReviewError: 422,
    ImageError: 404,
    SiteError: 422,
}


@dataclass(frozen=True)
class Desk:
    """What every request needs; made once by create_app."""

    config: Config
    pages: Pages
    sessions: Sessions
    headers: worklist.Headers
    images: Images
    throttle: LoginThrottle
    one_login: Lock  # a password check costs 32 MiB: one at a time


@dataclass(frozen=True)
class Visit:
    """One request of a signed-in reviewer (or of a stranger at the login), with its own database connection."""

    request: Request
    desk: Desk
    db: sqlite3.Connection
    session: Session | None
    form: Mapping[str, str]

    @property
    def reviewer(self) -> str:
        return self.session.user if self.session else ""

    @property
    def csrf(self) -> str:
        return self.desk.sessions.csrf_token(self.session) if self.session else ""

    @property
    def series_no(self) -> int:
        return min(int(self.request.path_params["series_no"]), MAX_SERIES_NO)

    def page(self, template: str, *, status: int = 200, **values: Any) -> Response:
        return self.desk.pages.html(
            template, status, reviewer=self.reviewer, csrf=self.csrf, config=self.desk.config, **values
        )


Handler = Callable[[Visit], Response]


def create_app(config: Config) -> Starlette:
    """The page of one box. Raises SiteError where data_dir cannot hold the signing key."""
    data_dir = config.box.data_dir
    pages = Pages.load()
    desk = Desk(
        config=config,
        pages=pages,
        sessions=Sessions(load_key(data_dir), config.review.session_hours),
        headers=worklist.Headers(data_dir),
        images=Images(data_dir),
        throttle=LoginThrottle(),
        one_login=Lock(),
    )
    app = Starlette(
        routes=_routes(),
        middleware=[Middleware(SecurityHeaders, with_tls=config.review.tls_certificate is not None)],
        exception_handlers={HTTPException: _refused, SiteError: _refused},
    )
    app.state.desk = desk
    return app


def _routes() -> list[Route | Mount]:
    private: list[tuple[str, str, Handler]] = [
        ("GET", "/", show_worklist),
        ("GET", "/quarantine", show_quarantine),
        ("GET", "/series/{series_no:int}", show_series),
        ("POST", "/series/{series_no:int}/review", take_verdict),
        ("GET", "/series/{series_no:int}/image/{z:int}.png", show_image),
        ("GET", "/series/{series_no:int}/heatmap/{z:int}.png", show_heatmap),
        ("GET", "/api/worklist", list_series),
        ("GET", "/api/quarantine", list_quarantine),
        ("GET", "/api/series/{series_no:int}", tell_series),
        ("POST", "/logout", sign_out),
    ]
    public: list[tuple[str, str, Handler]] = [("GET", "/login", show_login), ("POST", "/login", sign_in)]
    return [
        *(Route(path, _visit(handler, with_session=True), methods=[method]) for method, path, handler in private),
        *(Route(path, _visit(handler, with_session=False), methods=[method]) for method, path, handler in public),
        Mount("/static", StaticFiles(packages=[("edge_agent", "static")])),
    ]


def show_worklist(visit: Visit) -> Response:
    show, page = _selection(visit)
    return visit.page(
        "worklist.html",
        entries=worklist.entries(visit.db, visit.desk.headers, show=show, page=page),
        counts=worklist.counts(visit.db),
        show=show,
        page_no=page,
        page_rows=worklist.PAGE_ROWS,
        now=time.time(),
    )


def list_series(visit: Visit) -> Response:
    show, page = _selection(visit)
    rows = worklist.entries(visit.db, visit.desk.headers, show=show, page=page)
    return _json({"show": show, "page": page, "counts": worklist.counts(visit.db), "series": rows})


def show_series(visit: Visit) -> Response:
    entry = worklist.find(visit.db, visit.desk.headers, visit.series_no)
    stack, weights, image_problem = None, [], ""
    try:
        stack = visit.desk.images.stack(visit.db, visit.series_no)
        weights = _slices_read(visit, entry)
    except SiteError as error:
        image_problem = "" if entry.images_removed_at is not None else f"{error} {error.advice}".strip()
    return visit.page(
        "series.html",
        entry=entry,
        history=reviews.history(visit.db, visit.series_no),
        stack=stack,
        weights=weights,
        image_problem=image_problem,
    )


def tell_series(visit: Visit) -> Response:
    entry = worklist.find(visit.db, visit.desk.headers, visit.series_no)
    return _json(
        {
            "series": entry,
            "slices_read": [{"slice": z, "weight": weight} for z, weight in _slices_read(visit, entry)],
            "history": reviews.history(visit.db, visit.series_no),
            "result_no": entry.result.result_no if entry.result else None,
            "csrf": visit.csrf,
        }
    )


def _slices_read(visit: Visit, entry: worklist.Entry) -> list[tuple[int, float]]:
    """(slice, weight); nothing once more images came, since they may have moved the slices."""
    if entry.result is None or not entry.is_current:
        return []
    return visit.desk.images.maps(entry.result.maps_path).weights()


def take_verdict(visit: Visit) -> Response:
    """Form: verdict, label, result_no (the result that was looked at), csrf."""
    form = visit.form
    if not form.get("result_no", "").isdecimal():
        raise HTTPException(422, "result_no is missing: it says which result you looked at.")
    review_no = reviews.record(
        visit.db,
        visit.series_no,
        form.get("verdict", ""),
        form.get("label", ""),
        visit.reviewer,
        time.time(),
        result_no=min(int(form["result_no"]), MAX_SERIES_NO),
    )
    if _wants_json(visit.request):
        return _json({"review_no": review_no})
    return RedirectResponse(f"/series/{visit.series_no}#verdict", 303)


def show_image(visit: Visit) -> Response:
    """Query: center and width of the window in modality units, both or neither."""
    window = _window(visit.request)
    stack = visit.desk.images.stack(visit.db, visit.series_no)
    return Response(grey_png(stack, visit.request.path_params["z"], window), media_type="image/png")


def show_heatmap(visit: Visit) -> Response:
    entry = worklist.find(visit.db, visit.desk.headers, visit.series_no)
    if entry.result is None or not entry.is_current:
        raise ImageError(f"series {visit.series_no} has no result for its present images, so there is no heatmap")
    stack = visit.desk.images.stack(visit.db, visit.series_no)
    maps = visit.desk.images.maps(entry.result.maps_path)
    return Response(heatmap_png(maps, stack, visit.request.path_params["z"]), media_type="image/png")


def show_quarantine(visit: Visit) -> Response:
    return visit.page("quarantine.html", files=_newest_quarantined(visit))


def list_quarantine(visit: Visit) -> Response:
    return _json({"files": _newest_quarantined(visit)})


def _newest_quarantined(visit: Visit) -> list[catalog.QuarantineRow]:
    return catalog.quarantined(visit.db)[: -MAX_QUARANTINED - 1 : -1]


def show_login(visit: Visit) -> Response:
    return visit.page("login.html", problem="", name="", has_users=bool(users.names(visit.db)))


def sign_in(visit: Visit) -> Response:
    """Form: name, password."""
    desk, now = visit.desk, time.time()
    name, password = visit.form.get("name", "").strip(), visit.form.get("password", "")
    address = visit.request.client.host if visit.request.client else ""
    with desk.one_login:
        wait_s = desk.throttle.wait_s(address, name, now)
        if wait_s > 0:
            problem = f"Too many failed attempts. Try again in {math.ceil(wait_s)} s."
            answer = visit.page("login.html", status=429, problem=problem, name=name, has_users=True)
            answer.headers["Retry-After"] = str(math.ceil(wait_s))
            return answer
        if not users.verify(visit.db, name, password):
            desk.throttle.failed(address, name, now)
            log.warning("review page: a login from %s was refused", address)
            has_users = bool(users.names(visit.db))
            problem = "Name or password is wrong."
            return visit.page("login.html", status=401, problem=problem, name=name, has_users=has_users)
        desk.throttle.succeeded(address, name)
    answer = RedirectResponse("/", 303)
    cookie = desk.sessions.issue(name, users.find_record(visit.db, name) or "", now)
    answer.set_cookie(
        desk.sessions.cookie_name,
        cookie,
        max_age=int(desk.config.review.session_hours * 3600),
        httponly=True,
        samesite="strict",
        secure=desk.config.review.tls_certificate is not None,
    )
    return answer


def sign_out(visit: Visit) -> Response:
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(visit.desk.sessions.cookie_name, httponly=True, samesite="strict")
    return answer


def _visit(handler: Handler, *, with_session: bool) -> Callable[[Request], Any]:
    """Around every handler: form limits, database, session and CSRF checks. Strangers are sent to the login."""

    async def endpoint(request: Request) -> Response:
        form = await _form(request) if request.method == "POST" else {}
        return await run_in_threadpool(enter, request, form)

    def enter(request: Request, form: Mapping[str, str]) -> Response:
        desk: Desk = request.app.state.desk
        with closing(database.connect(desk.config.box.data_dir)) as db:
            cookie = request.cookies.get(desk.sessions.cookie_name, "")
            session = desk.sessions.open(cookie, lambda name: users.find_record(db, name), time.time())
            if with_session and session is None:
                if request.method == "GET" and not _wants_json(request) and not request.url.path.endswith(".png"):
                    return RedirectResponse("/login", 303)
                raise HTTPException(401, "Sign in first: POST name and password to /login.")
            if with_session and session and request.method == "POST":
                _check_csrf(desk, session, form)
            return handler(Visit(request, desk, db, session, form))

    return endpoint


async def _form(request: Request) -> Mapping[str, str]:
    """Text fields of a small form; what another site's page sends is refused."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "This form was sent from another site's page.")
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_FORM_BYTES:
        raise HTTPException(413, f"A form has a Content-Length of at most {MAX_FORM_BYTES} bytes.")
    async with request.form(max_files=0, max_fields=20) as form:
        return {name: value for name, value in form.items() if isinstance(value, str)}


def _check_csrf(desk: Desk, session: Session, form: Mapping[str, str]) -> None:
    if not desk.sessions.is_csrf_token(session, form.get("csrf", "")):
        raise HTTPException(403, "The form is not from this page or from an old login. Reload the page and try again.")


def _selection(visit: Visit) -> tuple[str, int]:
    query = visit.request.query_params
    show, page = query.get("show", "all"), query.get("page", "1")
    if show not in worklist.SHOWN:
        raise HTTPException(422, f"show is one of {', '.join(worklist.SHOWN)}.")
    if not page.isdecimal() or not 1 <= int(page) <= MAX_PAGE:
        raise HTTPException(422, "page is a number from 1.")
    return show, int(page)


def _window(request: Request) -> tuple[float, float] | None:
    query = request.query_params
    if "center" not in query and "width" not in query:
        return None
    try:
        center, width = float(query["center"]), float(query["width"])
    except (KeyError, ValueError) as error:
        raise HTTPException(422, "center and width are two numbers.") from error
    if not (math.isfinite(center) and math.isfinite(width) and width > 0):
        raise HTTPException(422, "center and width are finite, and width is above 0.")
    return center, width


def _wants_json(request: Request) -> bool:
    return request.url.path.startswith("/api/") or "application/json" in request.headers.get("accept", "")


def _refused(request: Request, error: Exception) -> Response:
    """Every refusal says what and why: as a page, or as JSON to whoever asked for it."""
    if isinstance(error, HTTPException):
        status, reason, advice = error.status_code, error.detail, ""
    else:
        status = next(_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS)
        reason, advice = str(error), getattr(error, "advice", "")
    if status == 404 and isinstance(error, HTTPException):
        reason = "There is no such page on this box."
    if _wants_json(request):
        return _json({"error": reason, "advice": advice}, status)
    desk: Desk = request.app.state.desk
    back = request.url.path.removesuffix("/review") if status in (403, 409, 422) else "/"
    values = {"status": status, "title": HTTPStatus(status).phrase, "reason": reason, "advice": advice, "back": back}
    return desk.pages.html("refused.html", status, reviewer="", csrf="", config=desk.config, **values)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
