"""The hub's configuration: hub.toml, read once, refused with section, key, value and reason.

Reads hub.toml over the packaged defaults (cloud_hub/hub.toml, the only place where a default is written).
Never read again after start, never a global: the frozen value is passed down.
Source: TOML 1.0; systemd.exec(5), "Credentials".
"""

import os
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fleet_link.errors import SiteError
from fleet_link.messages import COHORT

CREDENTIAL = "credential:"
Port = Annotated[int, Meta(ge=1, le=65535)]
HostName = Annotated[str, Meta(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?\Z")]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0.0, le=30 * 86400.0)]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class HubSection(_Section, frozen=True, kw_only=True):
    data_dir: Annotated[str, Meta(min_length=1)]
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]


class BrokerSection(_Section, frozen=True, kw_only=True):
    program: Annotated[str, Meta(min_length=1)]
    host: HostName
    bind: HostName
    port: Port
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)]
    connections_max: Positive
    memory_bytes_max: Annotated[int, Meta(ge=64 * 1024**2, le=1024**4)]


class HttpsSection(_Section, frozen=True, kw_only=True):
    host: HostName
    bind: HostName
    port: Port
    session_hours: Annotated[int, Meta(ge=1, le=168)]


class CertificatesSection(_Section, frozen=True, kw_only=True):
    ca_passphrase: Annotated[str, Meta(min_length=1)]
    device_days: Annotated[int, Meta(ge=7, le=825)]
    renew_grace_days: Annotated[int, Meta(ge=0, le=3650)]
    server_days: Annotated[int, Meta(ge=1, le=825)]
    crl_days: Annotated[int, Meta(ge=7, le=3650)]
    token_hours: Annotated[int, Meta(ge=1, le=8760)]


class RoundsSection(_Section, frozen=True, kw_only=True):
    loop_s: Annotated[float, Meta(gt=0.0, le=60.0)]
    deadline_s: Annotated[float, Meta(ge=10.0, le=30 * 86400.0)]
    stage_s: Annotated[float, Meta(ge=1.0, le=86400.0)]
    min_devices: Positive
    min_cohort: Annotated[int, Meta(ge=2, le=COHORT)]
    min_examples: Positive
    epochs: Annotated[int, Meta(ge=1, le=1000)]
    learning_rate: Annotated[float, Meta(gt=0.0, le=1.0)]
    clip_norm: Annotated[float, Meta(gt=0.0, le=1e6)]
    share: Annotated[float, Meta(gt=0.0, le=1.0)]
    examples_cap: Positive
    update_per_base_max: Annotated[float, Meta(gt=0.0, le=16.0)]
    export_timeout_s: Seconds


class RolloutSection(_Section, frozen=True, kw_only=True):
    canaries: Positive
    resend_s: Seconds
    heartbeat_max_age_s: Seconds


@dataclass(frozen=True)
class Paths:
    """Every file of the hub's data directory, named once."""

    data_dir: Path

    @property
    def database(self) -> Path:
        return self.data_dir / "hub.db"

    @property
    def ca_key(self) -> Path:
        return self.data_dir / "ca" / "ca.key"

    @property
    def ca_certificate(self) -> Path:
        return self.data_dir / "ca" / "ca.pem"

    @property
    def root_key(self) -> Path:
        """Needed for a new intermediate only: it may lie elsewhere, offline."""
        return self.data_dir / "ca" / "root.key"

    @property
    def root_passphrase(self) -> Path:
        return self.data_dir / "root.passphrase"

    @property
    def crl(self) -> Path:
        return self.data_dir / "broker" / "crl.pem"

    @property
    def server_key(self) -> Path:
        return self.data_dir / "keys" / "server.key"

    @property
    def server_certificate(self) -> Path:
        return self.data_dir / "keys" / "server.pem"

    @property
    def hub_key(self) -> Path:
        return self.data_dir / "keys" / "hub.key"

    @property
    def hub_certificate(self) -> Path:
        return self.data_dir / "keys" / "hub.pem"

    @property
    def sealing_key(self) -> Path:
        return self.data_dir / "keys" / "sealing.key"

    @property
    def tuf_keys(self) -> Path:
        return self.data_dir / "keys" / "tuf"

    @property
    def broker(self) -> Path:
        return self.data_dir / "broker"

    @property
    def releases(self) -> Path:
        return self.data_dir / "releases"

    @property
    def rounds(self) -> Path:
        return self.data_dir / "rounds"

    @property
    def admin_token(self) -> Path:
        return self.data_dir / "admin.token"


class Config(_Section, frozen=True, kw_only=True):
    hub: HubSection
    broker: BrokerSection
    https: HttpsSection
    certificates: CertificatesSection
    rounds: RoundsSection
    rollout: RolloutSection

    @property
    def paths(self) -> Paths:
        return Paths(Path(self.hub.data_dir))

    @property
    def ca_passphrase(self) -> Path:
        """The file; a credential of systemd is one too."""
        named = self.certificates.ca_passphrase
        if named.startswith(CREDENTIAL):
            return Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), named.removeprefix(CREDENTIAL))
        return Path(self.hub.data_dir) / named

    @property
    def broker_here(self) -> str:
        """Where this machine finds its own broker, whose certificate names localhost too."""
        is_everywhere = self.broker.bind in ("0.0.0.0", "127.0.0.1", "localhost", "::")  # noqa: S104 - compared, not bound
        return "localhost" if is_everywhere else self.broker.host

    @property
    def url(self) -> str:
        return f"https://{_in_url(self.https.host)}:{self.https.port}"


def load(path: Path) -> Config:
    """Read hub.toml. Gives a Config with an absolute data_dir.

    Raises SiteError naming section.key, value and reason.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise SiteError(f"{path}: {error.strerror}", advice="give --config, or make a hub first: hub init") from error
    except UnicodeDecodeError as error:
        raise SiteError(f"{path}: not UTF-8 text", advice="save the file as UTF-8") from error
    return parse(text, where=path)


def parse(text: str, *, where: Path) -> Config:
    """As `load`, from text; `where` is the file that relative paths refer to."""
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SiteError(f"{where}: not TOML: {error}", advice="correct the named line") from error
    merged = _over_defaults(given, where)
    try:
        config = msgspec.convert(merged, Config)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), merged, where) from error
    data_dir = (where.resolve().parent / config.hub.data_dir).resolve()
    return msgspec.structs.replace(config, hub=msgspec.structs.replace(config.hub, data_dir=str(data_dir)))


def default_text() -> str:
    """The packaged hub.toml with its comments."""
    return files("cloud_hub").joinpath("hub.toml").read_text("utf-8")


def with_value(text: str, section: str, key: str, value: str | int) -> str:
    """The text of a hub.toml with one value replaced, comments kept. Used by `hub init` only."""
    literal = str(value) if isinstance(value, int) else f'"{value}"'
    pattern = re.compile(rf"(^\[{section}\]\n(?:(?!\[).*\n)*?{key} = )(\"[^\"]*\"|\S+)", re.MULTILINE)
    replaced, count = pattern.subn(lambda found: found.group(1) + literal, text, count=1)
    if count != 1:
        raise KeyError(f"{section}.{key}")
    return replaced


def _over_defaults(given: dict[str, Any], where: Path) -> dict[str, Any]:
    merged: dict[str, Any] = tomllib.loads(default_text())
    for section, keys in given.items():
        if not isinstance(keys, dict):
            raise SiteError(f"{where}: {section} = {keys!r}: stands outside a section", advice=_ADVICE)
        merged[section] = {**merged.get(section, {}), **keys}
    return merged


_ADVICE = "compare with the packaged hub.toml, where every key is explained"
_AT = re.compile(r" - at `\$\.?([\w.]*)`$")
_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


def _refusal(reason: str, merged: dict[str, Any], where: Path) -> SiteError:
    """msgspec says where (`$.broker.port`) and why; the operator also needs the value."""
    place, unknown = _AT.search(reason), _UNKNOWN.search(reason)
    keys = (place.group(1).split(".") if place and place.group(1) else []) + ([unknown.group(1)] if unknown else [])
    value: Any = merged
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    why = ("unknown key" if len(keys) > 1 else "unknown section") if unknown else _AT.sub("", reason)
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return SiteError(f"{where}: {'.'.join(keys)}{shown}: {why}", advice=_ADVICE)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
