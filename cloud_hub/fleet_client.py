"""How `fleet` reaches the hub: where it is, the operator's token, the CA it must show; one call, one answer.

Reads fleet.toml, the token file and the CA file; talks HTTPS to the hub's API.
Never trusts a hub that this CA does not vouch for, and never prints the token.
Source: RFC 6750 (Bearer).
"""

import ssl
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec

from cloud_hub.terminal import RefusedError
from fleet_link.errors import LinkError, SiteError, TrustError, WardroundError

TIMEOUT_S = 30.0
PLACES = (Path("fleet.toml"), Path("~/.config/wardround/fleet.toml"), Path("/etc/wardround/fleet.toml"))


class _FleetFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hub: str
    token_file: str
    ca: str


@dataclass(frozen=True)
class Address:
    hub: str
    token_file: Path
    ca: Path


def find(config: Path | None, hub: str | None, token_file: Path | None, ca: Path | None) -> Address:
    """Options win over fleet.toml, which is looked for in PLACES. Raises SiteError when something is missing."""
    if hub and token_file and ca:
        return Address(hub, token_file, ca)
    path = config or next((place.expanduser() for place in PLACES if place.expanduser().exists()), None)
    if path is None:
        raise SiteError(
            f"no {', '.join(str(place) for place in PLACES)}",
            advice="run fleet in the hub's data directory, or give --config, or --hub with --token-file and --ca",
        )
    found = _read(path)
    here = path.resolve().parent
    return Address(hub or found.hub, token_file or here / found.token_file, ca or here / found.ca)


def call(address: Address, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The value the hub answers with.

    Raises RefusedError (the hub said no), LinkError (hub away), TrustError (not our hub, or not our token).
    """
    with httpx.Client(
        verify=_trusting(address.ca),
        headers={"authorization": f"Bearer {_token(address.token_file)}"},
        timeout=TIMEOUT_S,
        trust_env=False,
    ) as hub:
        try:
            answer = hub.request(method, f"{address.hub.rstrip('/')}/api/v1{path}", json=body)
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError) as error:
            raise _away(address, error) from error
    return _value(address, answer)


def _value(address: Address, answer: httpx.Response) -> Any:
    try:
        value = answer.json()
    except ValueError as error:
        raise LinkError(
            f"{address.hub} does not answer like a hub ({answer.status_code})", advice="check --hub"
        ) from error
    if answer.is_success:
        return value
    said, advice = str(value.get("error", answer.reason_phrase)), str(value.get("advice", ""))
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise TrustError(said, advice=f"{advice}; it is now {address.token_file}")
    raise RefusedError(said, advice=advice)


def _away(address: Address, error: Exception) -> WardroundError:
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return TrustError(
            f"{address.hub} does not show a certificate of this fleet's CA",
            advice=f"check --hub, and that {address.ca} is the hub's ca.pem",
        )
    return LinkError(f"the hub cannot be reached at {address.hub}: {error}", advice="is it running? hub status")


def _read(path: Path) -> _FleetFile:
    try:
        return msgspec.convert(tomllib.loads(path.read_text("utf-8")), _FleetFile)
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", advice="give --config the fleet.toml of the hub") from error
    except (ValueError, msgspec.ValidationError) as error:
        raise SiteError(f"{path}: {error}", advice="it needs hub, token_file and ca; hub init writes one") from error


def _token(path: Path) -> str:
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError(f"the admin token {path} cannot be read: {error}", advice="give --token-file") from error
    if not token or not token.isprintable():
        raise SiteError(f"{path} holds no admin token", advice="give --token-file the hub's admin.token")
    return token


def _trusting(ca: Path) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(ca))
    except (OSError, ssl.SSLError) as error:
        raise SiteError(f"the CA file {ca} cannot be read: {error}", advice="give --ca the hub's ca/ca.pem") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
