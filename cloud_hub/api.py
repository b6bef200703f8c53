"""The hub's HTTPS side: JSON for operators under /api/v1, enrolment for boxes, the hub page.

Reads and writes the tables through registry, invitations, ledger and views; the broker is told after the commit.
Never answers without the admin token, but for enrolment, which has its own.
Source: RFC 6750 (Bearer); RFC 9110.
"""

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from sqlalchemy.orm import Session
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from cloud_hub import dashboard, enrolment, invitations, ledger, registry, views
from cloud_hub.context import Context, bounded_body, same_secret
from cloud_hub.registry import NotFoundError
from fleet_link.errors import SiteError, WardroundError
from fleet_link.messages import BASES, COHORT, GROUPS, Rule
from models.delta import Trainable
from models.drawn_delta import MAX_VALUE_BITS, MIN_VALUE_BITS

BODY_BYTES_MAX = 64 * 1024
REFUSALS_SHOWN = 200

Endpoint = Callable[[Request], Awaitable[Response]]


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class NewSite(_Body, frozen=True):
    site: str


class NewDevice(_Body, frozen=True):
    device: str
    site: str


class NewRound(_Body, frozen=True):
    """What is left out is taken from the section [rounds] of hub.toml."""

    kind: Literal["masked", "unsafe_open"] = "masked"
    rule: Rule = "fedavg"
    trainable: Trainable = "all"
    epochs: Annotated[int, Meta(ge=1, le=1000)] | None = None
    learning_rate: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    clip_norm: Annotated[float, Meta(gt=0.0, le=1e6)] | None = None
    min_examples: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    min_devices: Annotated[int, Meta(ge=1, le=100_000)] | None = None
    deadline_s: Annotated[float, Meta(ge=10.0, le=30 * 86400.0)] | None = None
    noise: Annotated[float, Meta(ge=0.0, le=1000.0)] = 0.0
    share: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    bits: Annotated[int, Meta(ge=MIN_VALUE_BITS, le=MAX_VALUE_BITS)] | None = None
    groups: Annotated[int, Meta(ge=1, le=GROUPS)] = 1
    buffer: Annotated[int, Meta(ge=0, le=COHORT)] = 0
    stale_max: Annotated[int, Meta(ge=0, lt=BASES)] | None = None
    devices: tuple[str, ...] | None = None


class DropRound(_Body, frozen=True):
    reason: Annotated[str, Meta(max_length=400)] = ""


def create_app(context: Context) -> Starlette:
    """Everything the hub serves over HTTPS."""
    static = StaticFiles(directory=str(files("cloud_hub").joinpath("static")))
    routes: list[BaseRoute] = [
        Mount("/api/v1", routes=_api_routes(context)),
        *enrolment.routes(context),
        *dashboard.routes(context),
        Mount("/static", static, name="static"),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    app.add_middleware(dashboard.SecurityHeaders)
    return app


def _api_routes(context: Context) -> list[BaseRoute]:
    api = _Api(context)
    return [
        Route("/status", api.get(api.status)),
        Route("/sites", api.get(lambda session, request, now: {"sites": views.sites(session)})),
        Route("/sites", api.post(api.add_site, NewSite), methods=["POST"]),
        Route("/devices", api.get(api.devices)),
        Route("/devices", api.post(api.add_device, NewDevice, changes_access=True), methods=["POST"]),
        Route("/devices/{device}", api.get(api.device)),
        Route("/devices/{device}/token", api.post(api.new_token, None), methods=["POST"]),
        Route("/devices/{device}/revoke", api.revoke_at_once, methods=["POST"]),
        Route("/rounds", api.get(lambda session, request, now: {"rounds": views.rounds(session)})),
        Route("/rounds", api.post(api.start_round, NewRound), methods=["POST"]),
        Route("/rounds/{round_id}", api.get(api.round)),
        Route("/rounds/{round_id}/drop", api.post(api.drop_round, DropRound), methods=["POST"]),
        Route("/releases", api.get(lambda session, request, now: {"releases": views.releases(session)})),
        Route("/releases/{release_version:int}", api.get(api.release)),
        Route("/accuracy", api.get(lambda session, request, now: {"accuracy": views.accuracy_by_release(session)})),
        Route("/refusals", api.get(api.refusals)),
    ]


class _Api:
    """One method per call: (session, request, now) -> value for a reading one, (session, request, body, now) else."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._config = context.config
        self._age_s = context.config.rollout.heartbeat_max_age_s

    # --- reading

    def status(self, session: Session, request: Request, now: float) -> Any:
        states = [row["state"] for row in views.devices(session, now=now, max_age_s=self._age_s)]
        return {
            "url": self._config.url,
            "mqtt": f"{self._config.broker.host}:{self._config.broker.port}",
            "broker_running": self._context.broker_running(),
            "devices": {state: states.count(state) for state in sorted(set(states))},
        }

    def devices(self, session: Session, request: Request, now: float) -> Any:
        return {"devices": views.devices(session, now=now, max_age_s=self._age_s)}

    def device(self, session: Session, request: Request, now: float) -> Any:
        return views.device(session, request.path_params["device"], now=now, max_age_s=self._age_s)

    def round(self, session: Session, request: Request, now: float) -> Any:
        return views.round_(session, request.path_params["round_id"])

    def release(self, session: Session, request: Request, now: float) -> Any:
        return views.release(session, request.path_params["release_version"])

    def refusals(self, session: Session, request: Request, now: float) -> Any:
        return {"refusals": views.refusals(session, limit=REFUSALS_SHOWN)}

    # --- writing

    def add_site(self, session: Session, request: Request, body: NewSite, now: float) -> Any:
        row = registry.add_site(session, body.site, now=now)
        return {"site": row.site, "created_at": row.created_at}

    def add_device(self, session: Session, request: Request, body: NewDevice, now: float) -> Any:
        registry.add_device(session, body.device, body.site, now=now)
        return self._token(session, body.device, now)

    def new_token(self, session: Session, request: Request, body: None, now: float) -> Any:
        return self._token(session, request.path_params["device"], now)

    def revoke(self, session: Session, request: Request, body: None, now: float) -> Any:
        device = request.path_params["device"]
        registry.revoke(session, device, now=now)
        return views.device(session, device, now=now, max_age_s=self._age_s)

    async def revoke_at_once(self, request: Request) -> Response:
        """Registry, broker's files, SIGHUP; then what the broker shows of it."""
        ordered_at = time.monotonic()
        revoked = await self.post(self.revoke, None, changes_access=True)(request)
        if revoked.status_code != 201:
            return revoked
        shown = await run_in_threadpool(self._context.cut_off, request.path_params["device"], ordered_at)
        return JSONResponse(json.loads(bytes(revoked.body)) | {"cut_off": asdict(shown)}, status_code=201)

    def start_round(self, session: Session, request: Request, body: NewRound, now: float) -> Any:
        defaults = self._config.rounds
        takes_share = body.kind == "masked" and body.trainable == "all" and not body.buffer
        round_id = invitations.start_round(
            session,
            self._config,
            kind=body.kind,
            rule=body.rule,
            trainable=body.trainable,
            epochs=body.epochs or defaults.epochs,
            learning_rate=body.learning_rate or defaults.learning_rate,
            clip_norm=body.clip_norm or defaults.clip_norm,
            min_examples=body.min_examples or defaults.min_examples,
            min_devices=body.min_devices or defaults.min_devices,
            deadline_s=body.deadline_s or defaults.deadline_s,
            noise=body.noise,
            share=body.share or (defaults.share if takes_share else 1.0),
            devices=list(body.devices) if body.devices is not None else None,
            now=now,
            bits=body.bits,
            groups=body.groups,
            buffer=body.buffer,
            stale_max=body.stale_max,
        )
        session.flush()
        return views.round_(session, round_id)

    def drop_round(self, session: Session, request: Request, body: DropRound, now: float) -> Any:
        round_id = request.path_params["round_id"]
        ledger.drop(session, round_id, body.reason, now)
        session.flush()
        return views.round_(session, round_id)

    def _token(self, session: Session, device: str, now: float) -> Any:
        token = registry.new_token(session, device, config=self._config, authority=self._context.authority, now=now)
        text = token.text()
        return {
            "device": device,
            "token": text,
            "command": f"edge-agent enroll {text}",
            "expires_at": now + self._config.certificates.token_hours * 3600.0,
        }

    # --- around each call

    def get(self, call: Callable[[Session, Request, float], Any]) -> Endpoint:
        def answer(request: Request) -> Response:
            with self._context.database.reading() as session:
                return JSONResponse(call(session, request, self._context.clock()))

        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(self._guarded, request, answer)

        return endpoint

    def post(
        self,
        call: Callable[[Session, Request, Any, float], Any],
        body_type: type[_Body] | None,
        *,
        changes_access: bool = False,
    ) -> Endpoint:
        def answer(request: Request, raw: bytes) -> Response:
            body = None if body_type is None else msgspec.json.decode(raw, type=body_type)
            with self._context.database.writing() as session:
                value = call(session, request, body, self._context.clock())
            if changes_access:
                self._context.reload_broker()  # after the commit: the broker's files follow the registry
            return JSONResponse(value, status_code=201)

        async def endpoint(request: Request) -> Response:
            raw = await bounded_body(request, BODY_BYTES_MAX)
            return await run_in_threadpool(self._guarded, request, lambda request: answer(request, raw))

        return endpoint

    def _guarded(self, request: Request, answer: Callable[[Request], Response]) -> Response:
        if not bearer_is_admin(request.headers.get("authorization", ""), self._context.admin_token):
            return self._unauthorised()
        try:
            return answer(request)
        except NotFoundError as error:
            return _error(404, error)
        except WardroundError as error:
            return _error(409, error)
        except msgspec.DecodeError as error:
            return _error(400, SiteError(f"the request is not understood: {error}", advice="see fleet --help"))

    def _unauthorised(self) -> Response:
        self._context.strangers.refused(device="", what="api", reason="wrong admin token")
        response = _error(401, SiteError("the admin token is missing or wrong", advice="give --token-file admin.token"))
        response.headers["WWW-Authenticate"] = 'Bearer realm="wardround"'
        return response


def bearer_is_admin(header: str, admin_token: str) -> bool:
    """Compares digests in constant time."""
    scheme, _, shown = header.partition(" ")
    return scheme.lower() == "bearer" and same_secret(shown.strip(), admin_token)


def _error(status: int, error: WardroundError) -> JSONResponse:
    return JSONResponse({"error": str(error), "advice": error.advice}, status_code=status)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": error.detail, "advice": ""}, status_code=error.status_code, headers=error.headers)
    return PlainTextResponse(error.detail + "\n", status_code=error.status_code, headers=error.headers)
