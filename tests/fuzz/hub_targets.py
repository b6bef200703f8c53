"""Fuzz targets of files and of the hub's HTTPS: bundles, manifests, certificate requests, HTTP credentials, EST.

Reads bytes; writes bundle files and a hub's folder in temporary folders.
Never through a socket: TLS and HTTP are other people's parsers, what they hand over is ours.
Source: models/bundle.py; RFC 7030 (EST), RFC 7617 (Basic).
"""

import asyncio
import base64
import tempfile
from functools import cache
from pathlib import Path

import httpx
import msgspec
import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.applications import Starlette

from cloud_hub import enrolment, registry, releases
from cloud_hub.context import Context
from cloud_hub.cutoff import CutOff
from cloud_hub.enrolment import EnrolmentRefusedError
from cloud_hub.strangers import Strangers
from fleet_link import pki
from models import bundle
from models.bundle import INPUT_NAMES, KNOWN_ANSWER, MANIFEST, OUTPUT_NAMES, WEIGHTS, BundleParts, write_bundle
from models.errors import BundleError
from models.spec import Manifest
from models.tasks import INPUTS, TASKS
from tests.cloud_hub.hub_support import make_hub_files, new_csr, new_key
from tests.fuzz import link_targets
from tests.fuzz.target import Target, target

BOX = "box-01"


@cache
def _folder() -> Path:
    """In memory where the system has such a place; emptied when the process ends."""
    memory = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    _kept.append(folder)
    return Path(folder.name)


_kept: list[object] = []


@cache
def _bundle_bytes() -> bytes:
    manifest = Manifest(1, "fuzz", "1", "hybrid-nano", INPUTS, TASKS, 1.0, 1, 17, {})
    known = {name: np.zeros((1, 1, 2, 2), np.float32) for name in INPUT_NAMES}
    known["modality_B"] = np.zeros(1, np.int64)
    outputs = {name: np.zeros((1, 9), np.float32) for name in OUTPUT_NAMES}
    path = _folder() / "whole.bundle"
    write_bundle(path, BundleParts(manifest, b"graph", {"head.bias": np.zeros(9, np.float32)}, known, outputs, "card"))
    return path.read_bytes()


def _members() -> dict[str, bytes]:
    return bundle._members(_bundle_bytes())


def _read(content: bytes) -> bundle.Bundle:
    path = _folder() / "read.bundle"
    path.write_bytes(content)
    return bundle.read_bundle(path)


@target("bundle")
def _bundle() -> Target:
    return Target("bundle", _read, (_bundle_bytes(),), (BundleError,))


@target("bundle-manifest")
def _bundle_manifest() -> Target:
    """A bundle in canonical form around any manifest."""

    def run(manifest: bytes) -> None:
        _read(bundle._zip(_members() | {MANIFEST: manifest}))

    return Target("bundle-manifest", run, (_members()[MANIFEST],), (BundleError,))


def _with_member(name: str, content: bytes) -> bytes:
    members = _members() | {name: content}
    manifest = msgspec.json.decode(members[MANIFEST])
    manifest["members"][name] = bundle.hashlib.sha256(content).hexdigest()
    return bundle._zip(members | {MANIFEST: msgspec.json.encode(manifest)})


@target("bundle-weights")
def _bundle_weights() -> Target:
    """A bundle in canonical form, digests and all, around any weights."""

    def run(weights: bytes) -> None:
        _read(_with_member(WEIGHTS, weights))

    return Target("bundle-weights", run, (_members()[WEIGHTS],), (BundleError,))


@target("bundle-known-answer")
def _bundle_known_answer() -> Target:
    def run(known_answer: bytes) -> None:
        _read(_with_member(KNOWN_ANSWER, known_answer))

    return Target("bundle-known-answer", run, (_members()[KNOWN_ANSWER],), (BundleError,))


@target("manifest")
def _manifest() -> Target:
    def run(content: bytes) -> None:
        path = _folder() / "manifest.bundle"
        path.write_bytes(content)
        bundle.read_manifest(path)

    return Target("manifest", run, (_bundle_bytes(),), (BundleError,))


@target("est-csr")
def _est_csr() -> Target:
    request = new_csr(new_key(), BOX)
    der, pem = request.public_bytes(Encoding.DER), request.public_bytes(Encoding.PEM)
    return Target("est-csr", enrolment.parse_csr, (base64.encodebytes(der), pem), (EnrolmentRefusedError,))


@target("est-basic")
def _est_basic() -> Target:
    def run(header: bytes) -> None:
        claim = enrolment.parse_basic(header.decode("latin-1"))
        assert claim.device

    seed = b"Basic " + base64.b64encode(b"box-01:" + b"s" * 32)
    return Target("est-basic", run, (seed,), (EnrolmentRefusedError,))


@target("est-shown")
def _est_shown() -> Target:
    """The certificate that a caller shows, and the name that the operator reads of it."""

    def run(der: bytes) -> None:
        enrolment._name_in(der)
        enrolment.check_shown(der, link_targets.authority().trust, 30, now=link_targets.now())

    seed = link_targets.identity().certificate_der
    return Target("est-shown", run, (seed,), (EnrolmentRefusedError,))


@target("est-http")
def _est_http() -> Target:
    """Whole requests at the routes, with a token that is good: the first byte says what else the fuzzer made."""
    folder = _folder() / "hub"
    files = make_hub_files(folder)
    files.add_device(BOX)
    now = link_targets.now()
    releases.Repository.create(files.config.paths, now=now)
    with files.database.writing() as session:
        token = registry.new_token(session, BOX, config=files.config, authority=files.authority, now=now)
    context = Context(
        config=files.config,
        database=files.database,
        authority=files.authority,
        strangers=Strangers(files.database, clock=lambda: now, seconds=lambda: now),
        admin_token="admin",
        reload_broker=lambda: None,
        cut_off=lambda device, ordered_at: CutOff(True, True, 0.0, ()),
        broker_running=lambda: True,
        clock=lambda: now,
    )
    hub = httpx.ASGITransport(Starlette(routes=enrolment.routes(context)))
    client, runner = httpx.AsyncClient(transport=hub, base_url="https://hub"), asyncio.Runner()
    good = b"Basic " + base64.b64encode(f"{BOX}:{token.secret}".encode())
    enrol = "/.well-known/est/simpleenroll"

    def run(content: bytes) -> None:
        if content[:1] == b"\x00":
            header, body = good, content[1:]
        elif content[:1] == b"\x01":
            header, body = b"Basic " + base64.b64encode(content[1:]), b""
        else:
            header, body = content[1:].replace(b"\r", b"").replace(b"\n", b""), b""
        answer = runner.run(client.post(enrol, content=body, headers={b"authorization": header}))
        assert answer.status_code in (200, 400, 401, 403, 413), answer.status_code
        if answer.status_code != 200:
            raise EnrolmentRefusedError(answer.status_code, answer.text, advice="")

    csr = base64.encodebytes(new_csr(new_key(), BOX).public_bytes(Encoding.DER))
    refused = (b"\x00" + pki.build_csr(new_key(), "box-02"), b"\x01box-01:x", b"\x02" + good)
    return Target("est-http", run, (b"\x00" + csr,), (EnrolmentRefusedError,), refused)
