"""The hub's tables and its transactions: SQLAlchemy 2 over SQLite (WAL, every commit on disk).

Reads and writes hub.db in data_dir. Times are unix seconds (float), digests are sha256 in hex.
Never holds an update or a bundle: those are files, named here by path relative to data_dir.
Source: SQLite "Write-Ahead Logging"; SQLAlchemy "Transactions with SQLite and the sqlite3 driver".
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Engine, ForeignKey, Index, create_engine, delete, event, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fleet_link.errors import SiteError

SCHEMA_VERSION = 3  # 2: masked rounds; 3: their groups
REFUSALS_KEPT = 10_000


class Base(DeclarativeBase):
    pass


class Counter(Base):
    """Single numbers that outlive the process."""

    __tablename__ = "counters"
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger)


class Site(Base):
    """A hospital."""

    __tablename__ = "sites"
    site: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[float]


class Device(Base):
    """A box. Its name is certificate CN, MQTT client id and topic segment."""

    __tablename__ = "devices"
    device: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.site"))
    created_at: Mapped[float]
    revoked_at: Mapped[float | None] = mapped_column(default=None)
    last_seen_at: Mapped[float | None] = mapped_column(default=None)
    last_sequence: Mapped[int] = mapped_column(BigInteger, default=0)  # highest envelope sequence seen; replay below it
    heartbeat: Mapped[str | None] = mapped_column(default=None)  # JSON of fleet_link.messages.Heartbeat


class Token(Base):
    """An enrolment token. used_at and certificate_serial are set in the transaction that stores the certificate."""

    __tablename__ = "tokens"
    secret_sha256: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"))
    created_at: Mapped[float]
    expires_at: Mapped[float]
    used_at: Mapped[float | None] = mapped_column(default=None)
    certificate_serial: Mapped[str | None] = mapped_column(ForeignKey("certificates.serial"), default=None)


class Certificate(Base):
    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(primary_key=True)  # hex
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"))
    public_key_sha256: Mapped[str]  # of the SubjectPublicKeyInfo, to answer a retried CSR with the same certificate
    not_after: Mapped[float]
    pem: Mapped[str]
    revoked_at: Mapped[float | None] = mapped_column(default=None)


class Round(Base):
    """states: cloud_hub.rounds."""

    __tablename__ = "rounds"
    round_id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    plan: Mapped[bytes]  # fleet_link.messages.encode(RoundPlan)
    min_devices: Mapped[int]
    base_digest: Mapped[str]
    candidate_digest: Mapped[str | None] = mapped_column(default=None)
    reason: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float]
    changed_at: Mapped[float]
    deadline: Mapped[float]


class RoundDevice(Base):
    """A box's part in a round. counted_at is set when its update is in the sum (and its file on disk)."""

    __tablename__ = "round_devices"
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.round_id"), primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), primary_key=True)
    state: Mapped[str]
    examples: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str] = mapped_column(default="")
    update_path: Mapped[str | None] = mapped_column(default=None)
    update_sha256: Mapped[str | None] = mapped_column(default=None)
    bytes_received: Mapped[int] = mapped_column(BigInteger, default=0)
    counted_at: Mapped[float | None] = mapped_column(default=None)
    changed_at: Mapped[float] = mapped_column(default=0.0)


class MaskedRound(Base):
    """How long the stages of a masked round wait."""

    __tablename__ = "masked_rounds"
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.round_id"), primary_key=True)
    stage_at: Mapped[float]  # when the round's state was entered; a restart moves it on
    stage_s: Mapped[float]


class MaskedGroup(Base):
    """What was settled in one group of a masked round (mostly there is one), each once: what boxes were told cannot be
    told otherwise. Its boxes and why it was left out stay when the round is over.
    """

    __tablename__ = "masked_groups"
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.round_id"), primary_key=True)
    group_no: Mapped[int] = mapped_column(primary_key=True)
    devices: Mapped[str]  # with a space between two
    circle: Mapped[bytes | None] = mapped_column(default=None)  # secure_sum.Circle
    sharing: Mapped[bytes | None] = mapped_column(default=None)  # the names of those whose shares are forwarded
    survivors: Mapped[bytes | None] = mapped_column(default=None)  # fleet_link.messages.Survivors
    reason: Mapped[str] = mapped_column(default="")  # why it was left out; "": it is on


class MaskedPart(Base):
    """What a box has said in a masked round, encoded; emptied (b"") when the round is over."""

    __tablename__ = "masked_parts"
    round_id: Mapped[str] = mapped_column(ForeignKey("rounds.round_id"), primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), primary_key=True)
    keys: Mapped[bytes | None] = mapped_column(default=None)  # fleet_link.messages.RoundKeys
    shares: Mapped[bytes | None] = mapped_column(default=None)  # Shares
    signature: Mapped[bytes | None] = mapped_column(default=None)  # SurvivorsSigned
    unmask: Mapped[bytes | None] = mapped_column(default=None)  # Unmask


class Release(Base):
    """states: cloud_hub.rollout. round_id is NULL for the bundle that came with the software."""

    __tablename__ = "releases"
    release_version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    bundle_digest: Mapped[str]
    round_id: Mapped[str | None] = mapped_column(ForeignKey("rounds.round_id"), default=None)
    path: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[float]
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")


class DeviceRelease(Base):
    """What became of a release on a box. outcome: offered | activated | refused | rolled-back."""

    __tablename__ = "device_releases"
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), primary_key=True)
    release_version: Mapped[int] = mapped_column(ForeignKey("releases.release_version"), primary_key=True)
    outcome: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    heldout: Mapped[int] = mapped_column(default=0)
    heldout_correct_before: Mapped[int] = mapped_column(default=0)
    heldout_correct_after: Mapped[int] = mapped_column(default=0)
    offered_at: Mapped[float | None] = mapped_column(default=None)
    reported_at: Mapped[float | None] = mapped_column(default=None)


class Canary(Base):
    """A device that tries a release before all others; chosen once, replaced only when it goes silent before it reports."""

    __tablename__ = "canaries"
    release_version: Mapped[int] = mapped_column(ForeignKey("releases.release_version"), primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), primary_key=True)


class Transfer(Base):
    """One large thing in or out. direction: in | out. state: open | done | refused."""

    __tablename__ = "transfers"
    transfer_id: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str] = mapped_column(ForeignKey("devices.device"), primary_key=True)
    direction: Mapped[str]
    kind: Mapped[str]
    subject: Mapped[str]
    sha256: Mapped[str]
    size: Mapped[int] = mapped_column(BigInteger)
    bytes_moved: Mapped[int] = mapped_column(BigInteger, default=0)
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    changed_at: Mapped[float]


class Refusal(Base):
    """Everything the hub refused. The same refusal again raises `count` and moves `at`."""

    __tablename__ = "refusals"
    refusal_no: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    device: Mapped[str]  # as claimed: not a foreign key, it may be a stranger
    what: Mapped[str]
    reason: Mapped[str]
    count: Mapped[int] = mapped_column(default=1)


Index("refusals_same", Refusal.device, Refusal.what, Refusal.reason)
Index("certificates_device", Certificate.device)
Index("tokens_device", Token.device)


# A masked round that was on: all who sent keys stand in its one group.
_GROUPS_OF_2 = """
INSERT INTO masked_groups (round_id, group_no, devices, circle, sharing, survivors, reason)
SELECT round_id, 1,
       (SELECT group_concat(device, ' ') FROM masked_parts AS part WHERE part.round_id = round.round_id AND keys IS NOT NULL),
       circle, sharing, survivors, ''
FROM masked_rounds AS round WHERE circle IS NOT NULL
"""


class Database:
    """Short transactions from any thread. `writing` is serialised (BEGIN IMMEDIATE), `reading` never waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reader = engine.execution_options(reads_only=True)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Commits at the end, rolls back on any exception. Rows stay readable after the commit."""
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view of the database."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    def close(self) -> None:
        self._engine.dispose()


def connect(path: Path) -> Database:
    """Open (and on first use create) hub.db.

    Raises SiteError when the file cannot be written or is from a newer software version.
    """
    _only_ours(path)
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30.0})
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    with engine.begin() as connection:
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if version > SCHEMA_VERSION:
            raise SiteError(
                f"hub.db has schema {version}, this software knows {SCHEMA_VERSION}",
                advice="install the software version that wrote it, or a newer one",
            )
        Base.metadata.create_all(connection)
        if version == 2:
            connection.exec_driver_sql(_GROUPS_OF_2)
        connection.exec_driver_sql(f"PRAGMA user_version={SCHEMA_VERSION}")
    return Database(engine)


def counter(session: Session, name: str) -> int:
    """0 where nothing was kept yet."""
    row = session.get(Counter, name)
    return row.value if row is not None else 0


def record_refusal(session: Session, *, device: str, what: str, reason: str, now: float, count: int = 1) -> None:
    """Make a refusal visible to the operator (`fleet refusals`). `what`: message, update, csr, token, connection, …"""
    device, reason = device[:63], reason[:500]
    same = session.scalars(select(Refusal).filter_by(device=device, what=what, reason=reason)).first()
    if same is not None:
        same.count += count
        same.at = now
        return
    session.add(Refusal(at=now, device=device, what=what, reason=reason, count=count))
    session.flush()
    newest = session.scalar(select(func.max(Refusal.refusal_no))) or 0
    session.execute(delete(Refusal).where(Refusal.refusal_no <= newest - REFUSALS_KEPT))


def _only_ours(path: Path) -> None:
    """Mode 0600 whatever the umask; SQLite gives -wal and -shm the rights of the database file."""
    try:
        path.touch(mode=0o600)
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.chmod(f"{path}{suffix}", 0o600)
    except OSError as error:
        raise SiteError(
            f"{path}: {error.strerror}", advice="is data_dir there, and may the hub write in it?"
        ) from error


def _on_connect(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # the driver starts no transaction by itself: _on_begin does
    dbapi_connection.execute("PRAGMA journal_mode=WAL")
    dbapi_connection.execute("PRAGMA synchronous=FULL")
    dbapi_connection.execute("PRAGMA foreign_keys=ON")


def _on_begin(connection: Any) -> None:
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")
