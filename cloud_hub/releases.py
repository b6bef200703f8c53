"""Signed releases: an Update Framework repository of bundles, kept in a folder.

Reads and writes data_dir/releases (metadata, bundles), keys/tuf and keys/root, and the table `releases`.
Never needs the root key after `init`: keys/root may be moved offline. Never signs over a metadata file that boxes may have.
Source: The Update Framework 1.0, "Detailed client workflow", through python-tuf's Metadata API.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from cloud_hub import database
from cloud_hub.config import Config, Paths
from cloud_hub.rollout import Stage
from fleet_link.errors import SiteError
from fleet_link.files import write_durably
from fleet_link.messages import ReleaseOffer
from models.bundle import SUFFIX, file_digest, read_bundle
from models.errors import BundleError

log = logging.getLogger(__name__)

Chain = tuple[Metadata[Timestamp], Metadata[Snapshot], Metadata[Targets]]  # as the client workflow follows it

ROLES = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
LIFE = {
    Root.type: timedelta(days=3650),
    Targets.type: timedelta(days=365),
    Snapshot.type: timedelta(days=30),
    Timestamp.type: timedelta(days=7),
}
LISTED_MAX = 64  # releases in the metadata: it must fit one message of the link
ROOTS_OFFERED = 8
_RESTORE = "restore the hub's data directory from backup"


@dataclass(frozen=True)
class Release:
    """A bundle as the signed metadata lists it."""

    release_version: int
    bundle_digest: str
    size: int
    round_id: str  # "" for the bundle that came with the software


def init(config: Config, bundle_path: Path, *, now: float) -> None:
    """Make keys and root where missing, and publish release 1. Twice is once."""
    repository = Repository.create(config.paths, now=now)
    release = repository.publish(bundle_path, round_id="", now=now)
    hub = database.connect(config.paths.database)
    try:
        with hub.writing() as session:
            add_row(session, release, now=now)
    finally:
        hub.close()


def root_bytes(config: Config) -> bytes:
    """The newest root: what a box pins at enrolment."""
    return _newest_root(config.paths.releases).read_bytes()


def add_row(session: Session, release: Release, *, now: float) -> None:
    """The release's row, if it is not there yet. The files are the truth; the row follows them.

    A database restored from a backup may not know the round: the release is then listed without it.
    """
    if session.get(database.Release, release.release_version) is not None:
        return
    known = session.get(database.Round, release.round_id) is not None
    session.add(
        database.Release(
            release_version=release.release_version,
            bundle_digest=release.bundle_digest,
            round_id=release.round_id if known else None,
            path=f"releases/{release.bundle_digest}{SUFFIX}",
            size=release.size,
            created_at=now,
            state=Stage.CANARY,
        )
    )
    session.flush()
    log.info(
        "release %d: published%s", release.release_version, f" from round {release.round_id}" * bool(release.round_id)
    )


class Repository:
    """The folder. What timestamp.json leads to is published; any other file is a leftover and is written over."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._folder = paths.releases

    @classmethod
    def create(cls, paths: Paths, *, now: float) -> "Repository":
        """Keys, root and empty metadata where missing."""
        paths.releases.mkdir(parents=True, exist_ok=True)
        repository = cls(paths)
        if not list(repository._folder.glob("*.root.json")):
            root = Metadata(Root(expires=_expiry(Root.type, now)))
            for role in ROLES:
                root.signed.add_key(repository._signer(role, create=True).public_key, role)
            root.sign(repository._signer(Root.type))
            write_durably(repository._folder / "1.root.json", root.to_bytes(), mode=0o644)
        if not (repository._folder / "timestamp.json").exists():
            empty = Metadata(Timestamp()), Metadata(Snapshot()), Metadata(Targets())
            repository._sign_from(Targets.type, empty, now)
        return repository

    def publish(self, bundle_path: Path, *, round_id: str, now: float) -> Release:
        """List the bundle in newly signed metadata: bundle first, then targets and snapshot, timestamp last.

        Gives the release it already is when it is listed. Raises SiteError on a bundle that is none.
        """
        try:
            bundle = read_bundle(bundle_path)
        except BundleError as error:
            raise SiteError(f"not released: {error}", advice=error.advice) from error
        listed = list(self.listed())
        known = next((release for release in listed if release.bundle_digest == bundle.digest), None)
        if known is not None:
            return known
        content = bundle_path.read_bytes()
        write_durably(self._folder / f"{bundle.digest}{SUFFIX}", content, mode=0o644)
        version = max((release.release_version for release in listed), default=0) + 1
        target = TargetFile.from_data(f"{bundle.digest}{SUFFIX}", content, ["sha256"])
        target.unrecognized_fields["custom"] = {"release_version": version, "round_id": round_id}
        timestamp, snapshot, targets = self._current()
        targets.signed.targets[target.path] = target
        for old in listed[: len(listed) + 1 - LISTED_MAX]:
            del targets.signed.targets[f"{old.bundle_digest}{SUFFIX}"]
        self._sign_from(Targets.type, (timestamp, snapshot, targets), now)
        return Release(version, bundle.digest, target.length, round_id)

    def renew(self, now: float) -> None:
        """Sign the whole chain anew, once at start: a folder restored from a backup is behind what boxes have seen.

        What the new timestamp does not lead to is a leftover and goes.
        """
        chain = self._current()
        self._sign_from(Targets.type, chain, now)
        current = {f"{metadata.signed.version}.{metadata.signed.type}.json" for metadata in chain[1:]}
        for role in (Snapshot.type, Targets.type):
            for path in self._folder.glob(f"*.{role}.json"):
                if path.name not in current:
                    path.unlink(missing_ok=True)

    def refresh(self, now: float) -> bool:
        """Sign again what is past half of its life, so that a box never meets stale metadata. True if anything was."""
        chain = self._current()
        for metadata in reversed(chain):
            if _due(metadata.signed, now):
                self._sign_from(metadata.signed.type, chain, now)
                return True
        return False

    def listed(self) -> Iterator[Release]:
        """The releases in the published metadata, oldest first."""
        targets = self._current()[2].signed.targets.values()
        for target in sorted(targets, key=lambda listed: cast(int, listed.custom["release_version"])):
            custom = target.custom
            yield Release(custom["release_version"], target.hashes["sha256"], target.length, custom["round_id"])

    def bundle_path(self, digest: str) -> Path:
        """Raises SiteError when the file is not there or is not what was published."""
        path = self._folder / f"{digest}{SUFFIX}"
        if not path.exists() or file_digest(path) != digest:
            raise SiteError(f"the bundle {digest[:12]} of a release is lost", advice=_RESTORE)
        return path

    def offer(self, release: Release, *, message_id: str) -> ReleaseOffer:
        """What a box needs to verify a release by itself."""
        _, snapshot, targets = self._current()
        roots = sorted(self._folder.glob("*.root.json"), key=_version_of)[-ROOTS_OFFERED:]
        return ReleaseOffer(
            message_id=message_id,
            release_version=release.release_version,
            bundle_digest=release.bundle_digest,
            bundle_size=release.size,
            roots=tuple(path.read_bytes() for path in roots),
            timestamp=self._read("timestamp.json"),
            snapshot=self._read(f"{snapshot.signed.version}.snapshot.json"),
            targets=self._read(f"{targets.signed.version}.targets.json"),
        )

    # --- metadata ---------------------------------------------------------------------------------

    def _current(self) -> Chain:
        try:
            timestamp = Metadata[Timestamp].from_bytes(self._read("timestamp.json"))
            snapshot_version = timestamp.signed.snapshot_meta.version
            snapshot = Metadata[Snapshot].from_bytes(self._read(f"{snapshot_version}.snapshot.json"))
            targets_version = snapshot.signed.meta["targets.json"].version
            return timestamp, snapshot, Metadata[Targets].from_bytes(self._read(f"{targets_version}.targets.json"))
        except (DeserializationError, KeyError, AttributeError) as error:
            raise SiteError(f"the release metadata is damaged: {error}", advice=_RESTORE) from error

    def _sign_from(self, role: str, chain: Chain, now: float) -> None:
        """Sign `role` and what lists it anew. Nothing is visible before timestamp.json is renamed into place."""
        timestamp, snapshot, targets = chain
        if role == Targets.type:
            self._renew(targets, now)
            snapshot.signed.meta["targets.json"] = MetaFile(targets.signed.version)
        if role in (Targets.type, Snapshot.type):
            self._renew(snapshot, now)
            timestamp.signed.snapshot_meta = MetaFile(snapshot.signed.version)
        self._renew(timestamp, now)

    def _renew(self, metadata: "Metadata[Timestamp] | Metadata[Snapshot] | Metadata[Targets]", now: float) -> None:
        signed: Signed = metadata.signed
        signed.version = max(signed.version + 1, int(now))  # above what boxes have seen, after a restored backup too
        signed.expires = _expiry(signed.type, now)
        metadata.sign(self._signer(signed.type))
        name = "timestamp.json" if signed.type == Timestamp.type else f"{signed.version}.{signed.type}.json"
        write_durably(self._folder / name, metadata.to_bytes(), mode=0o644)

    def _signer(self, role: str, *, create: bool = False) -> CryptoSigner:
        folder = self._paths.tuf_keys.parent / "root" if role == Root.type else self._paths.tuf_keys
        path = folder / f"{role}.key"
        if create and not path.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_durably(path, CryptoSigner.generate_ed25519().private_bytes, mode=0o600)
        try:
            return CryptoSigner(load_pem_private_key(path.read_bytes(), password=None))
        except (OSError, ValueError) as error:
            raise SiteError(f"the {role} key cannot be read: {error}", advice=_RESTORE) from error

    def _read(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise SiteError(f"releases/{name} cannot be read: {error.strerror}", advice=_RESTORE) from error


def _newest_root(folder: Path) -> Path:
    roots = sorted(folder.glob("*.root.json"), key=_version_of)
    if not roots:
        raise SiteError("there is no root metadata", advice="complete the hub: hub init")
    return roots[-1]


def _version_of(path: Path) -> int:
    return int(path.name.split(".")[0])


def _expiry(role: str, now: float) -> datetime:
    return datetime.fromtimestamp(int(now), UTC) + LIFE[role]


def _due(signed: Signed, now: float) -> bool:
    return signed.expires - datetime.fromtimestamp(now, UTC) < LIFE[signed.type] / 2
