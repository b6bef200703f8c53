"""What the hub's HTTPS side works with, handed to it once by the service.

Reads and writes nothing by itself, but for the bodies of requests, up to a limit.
Never a global.
Source: STYLE.md, "Config".
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from cloud_hub.ca import Authority
from cloud_hub.config import Config
from cloud_hub.cutoff import CutOff
from cloud_hub.database import Database
from cloud_hub.strangers import Strangers


@dataclass(frozen=True)
class Context:
    config: Config
    database: Database
    authority: Authority
    strangers: Strangers
    admin_token: str
    reload_broker: Callable[[], None]  # Broker.reload: access files from the registry, then SIGHUP
    cut_off: Callable[[str, float], CutOff]  # of a revoked device, ordered at this time.monotonic
    broker_running: Callable[[], bool]
    clock: Callable[[], float]  # unix seconds


async def bounded_body(request: Request, limit: int) -> bytes:
    """The request's body. Raises 413 as soon as it is over `limit` bytes, 400 where it breaks off."""
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise HTTPException(413, f"the body is over {limit} bytes")
    except ClientDisconnect as error:
        raise HTTPException(400, "the body broke off") from error
    return body


def same_secret(shown: str, secret: str) -> bool:
    """In constant time, whatever the lengths."""
    return hmac.compare_digest(hashlib.sha256(shown.encode()).digest(), hashlib.sha256(secret.encode()).digest())
