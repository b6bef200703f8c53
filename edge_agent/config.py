"""Configuration: one frozen dataclass per section, refused with key, value and reason if wrong.

Reads edge-agent.toml: the shipped file for every default, the site's own file over it.
Never reads the environment; never changes after load.
Source: TOML 1.0; AE titles DICOM PS3.5 section 6.2 (VR AE).
"""

import ipaddress
import tomllib
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from fleet_link.errors import SiteError
from models.delta import Trainable

ADVICE = "correct the file and start again; edge_agent/edge-agent.toml documents every key"
ANY_AE = "*"

AeTitle = Annotated[
    str,
    Meta(
        pattern=r"^[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?\Z",  # not $, which also takes a newline at the end
        description="an AE title has 1 to 16 ASCII characters, no backslash, no blank at either end",
    ),
]
Port = Annotated[int, Meta(ge=1, le=65535, description="a port is a whole number from 1 to 65535")]
ListenPort = Annotated[int, Meta(ge=0, le=65535, description="a port is a whole number to 65535; 0 takes a free one")]
Seconds = Annotated[float, Meta(gt=0.0, le=1e8, description="seconds are a number above 0")]
Host = Annotated[str, Meta(pattern=r"^[^\s/]+\Z", description="a host is a name or an address, without blanks")]
Url = Annotated[str, Meta(pattern=r"^(https://[^\s/]+/?)?\Z", description='an address as https://host:port, or ""')]
CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
Hours = Annotated[
    str,
    Meta(pattern=rf"^{CLOCK}-({CLOCK}|24:00)\Z", description='hours are "HH:MM-HH:MM", as in "20:00-06:00"'),
]


@dataclass(frozen=True)
class Box:
    data_dir: Path
    site: Annotated[str, Meta(max_length=64, description="a site name has at most 64 characters")]
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"]


@dataclass(frozen=True)
class Dicom:
    ae_title: AeTitle
    bind: Host
    port: ListenPort
    accept_called_ae: tuple[AeTitle, ...]
    accept_calling_ae: tuple[AeTitle, ...]
    max_associations: Annotated[int, Meta(ge=1, le=1000)]
    association_timeout_s: Seconds
    idle_timeout_s: Seconds
    quiet_time_s: Annotated[float, Meta(ge=0.0, le=86400.0)]
    min_free_bytes: Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class Storage:
    keep_days: Annotated[int, Meta(ge=0, le=36500, description="days are a whole number to 36500; 0 keeps for ever")]


@dataclass(frozen=True)
class Pacs:
    enabled: bool
    host: Host
    port: Port
    ae_title: AeTitle
    calling_ae_title: AeTitle


@dataclass(frozen=True)
class Inference:
    providers: Annotated[tuple[str, ...], Meta(min_length=1, description="at least one ONNX Runtime provider")]
    precision: Literal["auto", "fp32"]
    threads: Annotated[int, Meta(ge=0, le=1024)]
    bundle: Path | None
    adapt: bool


@dataclass(frozen=True)
class Review:
    bind: Host
    port: ListenPort
    tls_certificate: Path | None
    tls_key: Path | None
    session_hours: Annotated[float, Meta(gt=0.0, le=720.0)]


@dataclass(frozen=True)
class Hub:
    enabled: bool
    url: Url
    mqtt_port: Annotated[
        int, Meta(ge=0, le=65535, description="a port is a whole number to 65535; 0 is that of the enrolment")
    ]
    heartbeat_s: Seconds


@dataclass(frozen=True)
class Policy:
    learn: bool
    tasks: tuple[Literal["XR", "CT", "MR"], ...]
    weights_may_leave: Annotated[
        tuple[Trainable, ...], Meta(min_length=1, description=f"at least one of {', '.join(get_args(Trainable))}")
    ]
    allow_unsafe_open_rounds: bool
    min_cohort: Annotated[
        int, Meta(ge=3, le=1000, description="a number of boxes from 3 to 1000: of two, each knows the other's part")
    ]
    min_examples: Annotated[int, Meta(ge=1)]
    require_noise: bool
    epsilon_max: Annotated[float, Meta(gt=0.0, le=1e6, description="epsilon is a number above 0")]
    delta: Annotated[float, Meta(gt=0.0, le=0.1, description="delta is a number above 0, at most 0.1; 1e-5 is usual")]
    hours: Hours


@dataclass(frozen=True)
class Learning:
    threads: Annotated[int, Meta(ge=1, le=1024)]
    nice: Annotated[int, Meta(ge=0, le=19)]
    timeout_s: Seconds
    heldout_fraction: Annotated[float, Meta(gt=0.0, lt=1.0)]
    replay_max: Annotated[int, Meta(ge=0, le=1_000_000, description="a number of examples from 0 to 1000000")]


@dataclass(frozen=True)
class Config:
    box: Box
    dicom: Dicom
    storage: Storage
    pacs: Pacs
    inference: Inference
    review: Review
    hub: Hub
    policy: Policy
    learning: Learning


def default_text() -> str:
    """The documented default file; `edge-agent init` writes it."""
    return files("edge_agent").joinpath("edge-agent.toml").read_text("utf-8")


def load(path: Path) -> Config:
    """Read the site's file over the defaults.

    Raises SiteError naming section.key, value and reason.
    """
    try:
        own = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SiteError(f"{path} cannot be read: {error}", advice="`edge-agent init` writes a default file") from error
    except tomllib.TOMLDecodeError as error:
        raise SiteError(f"{path} is not TOML: {error}", advice=ADVICE) from error
    return parse(own, folder=path.resolve().parent)


def parse(own: dict[str, Any], *, folder: Path) -> Config:
    """Check every key of the site's tables; relative paths belong to `folder`."""
    default = tomllib.loads(default_text())
    for section, keys in own.items():
        if section not in default:
            raise _refused(f"[{section}]", "", f"unknown section; there are {', '.join(default)}")
        if not isinstance(keys, dict):
            raise _refused(section, keys, f"a section, written as [{section}]")
        for key, value in keys.items():
            if key not in default[section]:
                raise _refused(f"{section}.{key}", value, f"unknown key; there are {', '.join(default[section])}")
    sections = {
        name: _section(kind, name, default[name] | own.get(name, {}), folder)
        for name, kind in get_type_hints(Config).items()
    }
    config = Config(**sections)
    _check_review(config.review)
    return config


def _section(kind: Any, name: str, values: dict[str, Any], folder: Path) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{f.name: _value(hints[f.name], f"{name}.{f.name}", values[f.name], folder) for f in fields(kind)})


def _value(hint: Any, key: str, value: Any, folder: Path) -> Any:
    if hint in (Path, Path | None):
        if not isinstance(value, str) or (hint is Path and not value):
            raise _refused(key, value, "a path in quotes")
        return (folder / value).resolve() if value else None
    try:
        return msgspec.convert(value, hint, strict=True)
    except msgspec.ValidationError as error:
        raise _refused(key, value, _reason(hint, error)) from error


def _reason(hint: Any, error: msgspec.ValidationError) -> str:
    """What the value should have been: our own words where the type has them, else its choices, else msgspec's."""
    for part in (hint, *get_args(hint)):
        described = [m.description for m in getattr(part, "__metadata__", ()) if isinstance(m, Meta) and m.description]
        if described:
            return str(described[0])
        if get_origin(part) is Literal:
            return f"one of {', '.join(get_args(part))}"
    return str(error).replace("`", "").replace(" - at `$", ", at item ")


def _check_review(review: Review) -> None:
    if (review.tls_certificate is None) != (review.tls_key is None):
        missing = "tls_key" if review.tls_key is None else "tls_certificate"
        raise _refused(f"review.{missing}", "", "certificate and key come together")
    if review.tls_certificate is None and not _is_loopback(review.bind):
        raise _refused("review.bind", review.bind, "without tls_certificate and tls_key only a loopback address")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refused(key: str, value: Any, reason: str) -> SiteError:
    shown = "" if value == "" else f" = {value!r}"
    return SiteError(f"{key}{shown} refused: {reason}", advice=ADVICE)
