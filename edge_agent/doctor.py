"""`edge-agent doctor`: try what the box needs, and say what to do about what is wrong.

Reads configuration, disk, ports, clock, certificates, ONNX Runtime's providers; asks PACS and hub for an answer.
Never changes anything.
"""

import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from enum import StrEnum
from importlib.util import find_spec

import httpx
import onnxruntime
from pynetdicom.ae import ApplicationEntity

from edge_agent import bundles, database, device_key, drift, est, health, identity, renewal, status, task_status
from edge_agent.config import Config
from edge_agent.device_key import LockedError, Seal
from fleet_link import pki
from fleet_link.errors import SiteError, WardroundError
from models.bundle import SHIPPED
from models.errors import ModelError

CLOCK_TOLERANCE_S = 120.0
TIMEOUT_S = 5.0


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Check:
    name: str
    level: Level
    finding: str
    advice: str = ""


def examine(config: Config) -> Iterator[Check]:
    """Each check in turn; those that need the network come last."""
    for check in (_disk, _ports, _providers, _bundle, _drift, _learning, _identity, _pacs, _hub):
        yield from check(config)


def _disk(config: Config) -> Iterator[Check]:
    data_dir = config.box.data_dir
    if not data_dir.is_dir():
        yield Check("disk", Level.ERROR, f"{data_dir} does not exist", "run `edge-agent init`, or create the folder")
        return
    free, least = health.free_bytes(data_dir), config.dicom.min_free_bytes
    text = f"{free / 1e9:.1f} GB free in {data_dir}; images are refused below {least / 1e9:.1f} GB"
    if free < least:
        yield Check("disk", Level.ERROR, text, "free space, or lower dicom.min_free_bytes")
    elif free < 3 * least:
        yield Check("disk", Level.WARNING, text, "plan for more space")
    else:
        yield Check("disk", Level.OK, text)


def _ports(config: Config) -> Iterator[Check]:
    running = config.box.data_dir.is_dir() and status.is_running(config.box.data_dir)
    doors = (("dicom", config.dicom.bind, config.dicom.port), ("review", config.review.bind, config.review.port))
    for section, host, port in doors:
        free = _can_bind(host, port)
        if running:
            yield Check(
                f"{section} port",
                Level.ERROR if free else Level.OK,
                f"{port} {'is not' if free else 'is'} open",
                "see the log",
            )
        elif free:
            yield Check(f"{section} port", Level.OK, f"{port} on {host} is free")
        else:
            yield Check(
                f"{section} port",
                Level.ERROR,
                f"{port} on {host} cannot be used",
                f"stop what uses it, or change {section}.port",
            )


def _providers(config: Config) -> Iterator[Check]:
    installed = onnxruntime.get_available_providers()
    wanted = [name for name in config.inference.providers if name in installed]
    text = f"ONNX Runtime {onnxruntime.__version__} has {', '.join(installed)}"
    if not wanted:
        yield Check("providers", Level.ERROR, text, "name one of these in inference.providers")
        return
    yield Check("providers", Level.OK, f"{text}; the first to try is {wanted[0]}")
    has_gpu = shutil.which("nvidia-smi") or shutil.which("tegrastats")
    if has_gpu and wanted == ["CPUExecutionProvider"]:
        yield Check(
            "gpu",
            Level.WARNING,
            "this machine has a GPU, but it is not used",
            "install the `gpu` extra instead of `cpu`",
        )


def _bundle(config: Config) -> Iterator[Check]:
    path = config.inference.bundle or SHIPPED
    try:
        reader = bundles.open_reader(config, path)
    except (ModelError, WardroundError) as error:
        yield Check("bundle", Level.ERROR, f"{path.name}: {error}", error.advice)
        return
    yield Check(
        "bundle", Level.OK, f"{path.name} {reader.bundle.digest[:12]} gives its known answers on {reader.provider}"
    )


def _drift(config: Config) -> Iterator[Check]:
    if not (config.box.data_dir / "box.db").exists():
        return
    with closing(database.connect(config.box.data_dir)) as db:
        for task in task_status.gather(db, config):
            level = Level.WARNING if task.drifted else Level.OK
            yield Check("drift", level, f"{task.task}: {task.drift_said}", drift.ADVICE if task.drifted else "")


def _learning(config: Config) -> Iterator[Check]:
    if config.policy.learn and find_spec("torch") is None:
        advice = "install the `train` extra, or set policy.learn = false"
        yield Check("learning", Level.WARNING, "torch is not installed: this box cannot fine-tune", advice)


def _identity(config: Config) -> Iterator[Check]:
    if not config.box.data_dir.is_dir() or not identity.is_enrolled(config.box.data_dir):
        yield Check("identity", Level.WARNING, "not enrolled: the box works alone", "run `edge-agent enroll TOKEN`")
        return
    yield _key(config)
    try:
        enrolled = identity.load(config.box.data_dir, device_key.passphrase())
    except LockedError:
        return
    except WardroundError as error:
        yield Check("identity", Level.ERROR, str(error), error.advice)
        return
    now = time.time()
    days = enrolled.life.days_left(now)
    text = f"{enrolled.address.device}, certificate valid for {days:.0f} days"
    if days < 0:
        expired = f"{enrolled.address.device}, the certificate has expired"
        yield Check("identity", Level.ERROR, expired, health.RENEW_ADVICE)
    elif now >= renewal.overdue_at(enrolled.life):
        yield Check("identity", Level.WARNING, f"{text}, and was not renewed", health.RENEW_ADVICE)
    else:
        in_days = max(0.0, (renewal.due_at(enrolled) - now) / identity.DAY_S)
        yield Check("identity", Level.OK, f"{text}, renewed by itself in {in_days:.0f}")


def _key(config: Config) -> Check:
    """How the device's key lies on the disk."""
    path = identity.folder(config.box.data_dir).key
    if not pki.is_encrypted(path):
        seals = shutil.which("systemd-creds") is not None
        text = "in clear, for the agent's user alone: whoever copies the disk or a backup of it can be this box"
        return Check("device key", Level.WARNING if seals else Level.OK, text, "packaging/seal-device-key, as root")
    try:
        device_key.check_open(path, device_key.passphrase())
    except LockedError as error:
        return Check(
            "device key", Level.WARNING, str(error), f"run doctor as root; if it says the same: {error.advice}"
        )
    except SiteError as error:
        return Check("device key", Level.ERROR, str(error), error.advice)
    seal = device_key.seal()
    where = {
        Seal.TPM: "the TPM of this machine opens it",
        Seal.HOST: "the host's key on this disk opens it: that guards copies of the data folder, not the disk",
        None: "systemd opens it",
    }[seal]
    return Check("device key", Level.OK, f"encrypted; {where}")


def _pacs(config: Config) -> Iterator[Check]:
    pacs = config.pacs
    if not pacs.enabled:
        yield Check("pacs", Level.WARNING, "results stay on the box", "set pacs.enabled = true and its address")
        return
    ae = ApplicationEntity(pacs.calling_ae_title)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = TIMEOUT_S
    ae.add_requested_context("1.2.840.10008.1.1")
    where = f"{pacs.ae_title} at {pacs.host}:{pacs.port}"
    try:
        association = ae.associate(pacs.host, pacs.port, ae_title=pacs.ae_title)
    except OSError as error:
        yield Check("pacs", Level.ERROR, f"{where}: {error.strerror}", "check pacs.host and DNS")
        return
    if not association.is_established:
        said = "refused the association" if association.is_rejected else "does not answer"
        yield Check(
            "pacs", Level.ERROR, f"{where} {said}", "check [pacs], the firewall, and that the PACS knows this AE title"
        )
        return
    answer = association.send_c_echo()
    association.release()
    done = bool(answer) and answer.Status == 0
    yield Check(
        "pacs",
        Level.OK if done else Level.ERROR,
        f"{where} {'answers' if done else 'fails'} C-ECHO",
        "see the PACS's log",
    )


def _hub(config: Config) -> Iterator[Check]:
    if not config.hub.enabled or not config.box.data_dir.is_dir() or not identity.is_enrolled(config.box.data_dir):
        return
    try:
        known = identity.known(config.box.data_dir)
    except SiteError:  # said above
        return
    address = known.address.under(config.hub)
    try:
        with socket.create_connection((address.mqtt_host, address.mqtt_port), TIMEOUT_S):
            yield Check("hub broker", Level.OK, f"{address.mqtt_host}:{address.mqtt_port} is open")
    except OSError as error:
        yield Check(
            "hub broker", Level.ERROR, f"{address.mqtt_host}:{address.mqtt_port}: {error}", "check firewall and hub"
        )
    try:
        context = ssl.create_default_context(cafile=str(known.folder.ca))
        answer = httpx.get(f"{address.hub_url}{est.CACERTS}", verify=context, timeout=TIMEOUT_S, trust_env=False)
        theirs = parsedate_to_datetime(answer.headers["date"]).replace(tzinfo=UTC).timestamp()
    except (httpx.HTTPError, OSError, KeyError, ValueError) as error:
        yield Check("hub", Level.ERROR, f"{address.hub_url}: {error}", "check firewall and hub")
        return
    away = abs(theirs - time.time())
    level = Level.OK if away < CLOCK_TOLERANCE_S else Level.ERROR
    yield Check("clock", level, f"{away:.0f} s from the hub's", "set up NTP: messages with a wrong time are refused")


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError:
            return False
        return True
