"""Renewal: at two thirds of its life the box's certificate is replaced, with a new key; the hub's intermediates are asked for.

Reads the certificate and the clock; the thread gets what is next over HTTPS, the link proves a certificate by a connection.
Never lets the certificate in use go before the next one stood; never gives up, and tells only what goes on failing.
Source: EST, RFC 7030 4.1.2 and 4.2.2; ARCHITECTURE.md, "The link".
"""

import hashlib
import logging
import random
import sqlite3
import time
from collections.abc import Callable
from threading import Event as StopEvent

from edge_agent import database, identity
from edge_agent.config import Config
from edge_agent.est import RefusedError
from edge_agent.identity import Enrolled, Life
from fleet_link.bus import Bus
from fleet_link.errors import WardroundError

log = logging.getLogger(__name__)

LOOK_S = 5.0
LEARN_S, LEARN_RETRY_S = 3600.0, 60.0  # the hub shows a new intermediate for days before it signs with it
RETRY_MIN_S, RETRY_MAX_S = 30.0, 3600.0
TOLD_AFTER_S = 86_400.0  # a hub that is away for less is nobody's trouble
PROOF_S = 20.0
PROOF_RETRY_AWAY_S, PROOF_RETRY_REFUSED_S = 60.0, 3600.0
DUE, OVERDUE = 2 / 3, 5 / 6  # of the certificate's life
SPREAD = 0.02  # of its life: a fleet that was enrolled in one hour does not renew in one
ALARM = "renewal"  # the name of its notice


def due_at(enrolled: Enrolled) -> float:
    """Unix seconds; drawn once for each certificate, the same after a restart."""
    start, end = enrolled.life
    draw = int.from_bytes(hashlib.sha256(enrolled.identity.certificate_der).digest()[:4]) / 2**32
    return start + (end - start) * (DUE + SPREAD * draw)


def overdue_at(life: Life) -> float:
    """When somebody should look: it should have been renewed long ago."""
    return life.start + (life.end - life.start) * OVERDUE


class Renewal:
    """The thread's part: from due until the next certificate waits for the link. `seconds` never goes back."""

    def __init__(
        self,
        config: Config,
        enrolled: Enrolled,
        clock: Callable[[], float] = time.time,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._enrolled = enrolled
        self._clock = clock
        self._seconds = seconds
        self._failures = 0
        self._failing_since = 0.0
        self._retry_at = float("-inf")
        self._learn_at = float("-inf")

    def run(self, stop: StopEvent) -> None:
        db = database.connect(self._config.box.data_dir)
        try:
            database.end_alarm(db, ALARM)  # what still fails is told again
            while not stop.is_set():
                self.step(db)
                stop.wait(LOOK_S)
        finally:
            db.close()

    def step(self, db: sqlite3.Connection) -> None:
        """Ask the hub when it is due. What goes wrong is tried again: at first soon, then every hour."""
        self._learn()
        now = self._clock()
        if now < due_at(self._enrolled) or self._seconds() < self._retry_at:
            return
        try:
            if identity.waiting(self._enrolled, now) is None:
                identity.renew(self._enrolled, self._config.hub)
                log.info("the hub has given the next certificate; the link proves it")
        except (WardroundError, OSError) as error:
            self._failed(db, error, now)
            return
        self._failures = 0
        self._retry_at = float("-inf")

    def _learn(self) -> None:
        """At start and every hour; a box that was away does it as soon as it reaches the hub, whose messages come again."""
        if self._seconds() < self._learn_at:
            return
        pause_s = LEARN_RETRY_S
        try:
            if identity.learn_authorities(self._enrolled, self._config.hub):
                log.info("the hub has another intermediate")
            pause_s = LEARN_S
        except (WardroundError, OSError) as error:
            log.debug("the hub's authorities are not learnt: %s", error)  # the link tells of a hub that is away
        self._learn_at = self._seconds() + pause_s * random.uniform(0.5, 1.0)  # noqa: S311 (not a secret)

    def _failed(self, db: sqlite3.Connection, error: WardroundError | OSError, now: float) -> None:
        if not self._failures:
            self._failing_since = self._seconds()
        pause_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(self._failures, 10))
        self._retry_at = self._seconds() + pause_s * random.uniform(0.5, 1.0)  # noqa: S311 (not a secret)
        self._failures += 1
        advice = error.advice if isinstance(error, WardroundError) else "check the disk and the rights on data_dir"
        log.warning("the certificate is not renewed: %s (%s)", error, advice)
        if isinstance(error, RefusedError) or self._seconds() - self._failing_since >= TOLD_AFTER_S:
            text = f"the certificate is not renewed: {error}: {advice}"
            database.raise_alarm(db, ALARM, text, now, is_notice=True)


class Proof:
    """The link's part: connect with the certificate that waits, and go on with whichever of the two stands."""

    def __init__(self, enrolled: Enrolled, open_bus: Callable[[Enrolled], Bus], clock: Callable[[], float]) -> None:
        self._enrolled = enrolled
        self._open_bus = open_bus  # not started
        self._clock = clock
        self._retry_at = float("-inf")

    def try_waiting(self, db: sqlite3.Connection, bus: Bus, stop: StopEvent) -> bool:
        """True when the next certificate is in use; `bus` has connected anew with it. Raises SiteError.

        Both have the box's one name at the broker, so the connection in use ends first, and is made again in any case.
        """
        if time.monotonic() < self._retry_at:
            return False
        waiting = identity.waiting(self._enrolled, self._clock())
        if waiting is None:
            return False
        was_connected = bus.connected
        bus.stop()
        trial = self._open_bus(waiting)
        try:
            stands = _connects(trial, stop)
            why = trial.last_error
            trial.stop()
            if stands:
                identity.take_over(self._enrolled, waiting)
        finally:
            bus.start()
        if stands:
            log.info("the certificate is renewed, for %.0f days", self._enrolled.life.days_left(self._clock()))
            database.end_alarm(db, ALARM)
        elif not stop.is_set():
            self._put_off(db, why, was_connected)
        return stands

    def _put_off(self, db: sqlite3.Connection, why: str, was_connected: bool) -> None:
        """With a broker that is away nothing is proved; one that had us a moment ago refuses the new certificate."""
        pause_s = PROOF_RETRY_REFUSED_S if was_connected else PROOF_RETRY_AWAY_S
        self._retry_at = time.monotonic() + pause_s * random.uniform(0.5, 1.0)  # noqa: S311 (not a secret)
        log.warning("the next certificate is not proved yet: %s", why)
        if was_connected:
            text = f"the broker does not take the renewed certificate, the box goes on with the one before: {why}"
            database.raise_alarm(db, ALARM, text, self._clock(), is_notice=True)


def _connects(bus: Bus, stop: StopEvent) -> bool:
    bus.start()
    until = time.monotonic() + PROOF_S
    while not bus.connected and time.monotonic() < until and not stop.wait(0.02):
        pass
    return bus.connected
