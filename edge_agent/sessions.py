"""Logins of the review page: signed session cookies, CSRF tokens, a brake on guessing.

Reads and writes `review.key` in data_dir; the rest is decided in memory with the clock passed in.
Never knows a password; a changed password or a removed user ends that user's sessions.
Source: RFC 2104 (HMAC), RFC 6265 (cookies), OWASP CSRF Prevention Cheat Sheet (HMAC token bound to the session).
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fleet_link.files import write_durably

KEY_BYTES = 32
_FREE_FAILURES = 5
_LONGEST_WAIT_S = 900.0
_FORGET_AFTER_S = 3600.0
_MOST_TRACKED = 10_000


class Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    session_id: str
    user: str
    expires_at: float


def load_key(data_dir: Path) -> bytes:
    """The box's signing key, made at first use. A file cut short by a power loss is made anew: users log in again."""
    path = data_dir / "review.key"
    if path.exists() and len(key := path.read_bytes()) == KEY_BYTES:
        return key
    key = secrets.token_bytes(KEY_BYTES)
    write_durably(path, key, mode=0o600)
    return key


@dataclass(frozen=True)
class Sessions:
    """Cookies this box signs. `find_record` gives a user's password record, which the signature covers."""

    key: bytes
    hours: float

    @property
    def cookie_name(self) -> str:
        """Differs from box to box: browsers send a host's cookies to all its ports."""
        return "wardround_" + hashlib.sha256(self.key).hexdigest()[:8]

    def issue(self, user: str, password_record: str, now: float) -> str:
        session = Session(secrets.token_hex(16), user, now + self.hours * 3600.0)
        body = base64.urlsafe_b64encode(msgspec.json.encode(session)).decode()
        return f"{body}.{self._mac('session', body, password_record)}"

    def open(self, cookie: str, find_record: Callable[[str], str | None], now: float) -> Session | None:
        """The session in a cookie, or None if forged, expired, or the user's password is no longer the same."""
        body, _, mac = cookie.partition(".")
        try:
            session = msgspec.json.decode(base64.urlsafe_b64decode(body), type=Session)
        except (msgspec.MsgspecError, binascii.Error, ValueError):
            return None
        record = find_record(session.user)
        if record is None or not _equal(mac, self._mac("session", body, record)):
            return None
        return session if now < session.expires_at else None

    def csrf_token(self, session: Session) -> str:
        return self._mac("csrf", session.session_id)

    def is_csrf_token(self, session: Session, token: str) -> bool:
        return _equal(token, self.csrf_token(session))

    def _mac(self, *parts: str) -> str:
        return hmac.new(self.key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())


@dataclass
class _Failures:
    count: int
    last_at: float


class LoginThrottle:
    """After five failures each further one doubles the wait, up to 15 minutes; an hour of quiet forgets them.

    Counted per address and per address with name, so that a stranger cannot lock a reviewer out from elsewhere.
    Used under one lock by its caller.
    """

    def __init__(self) -> None:
        self._failures: dict[str, _Failures] = {}

    def wait_s(self, address: str, user: str, now: float) -> float:
        return max(self._wait_s(key, free, now) for key, free in _keys(address, user))

    def failed(self, address: str, user: str, now: float) -> None:
        for key, _ in _keys(address, user):
            known = self._failures.pop(key, None)
            count = known.count if known and now - known.last_at < _FORGET_AFTER_S else 0
            self._failures[key] = _Failures(count + 1, now)  # newest last: the oldest goes first
        while len(self._failures) > _MOST_TRACKED:
            del self._failures[next(iter(self._failures))]

    def succeeded(self, address: str, user: str) -> None:
        """Forgets the name's failures; the address's stay, or one valid login would reset the brake for all names."""
        self._failures.pop(f"{address}\0{user}", None)

    def _wait_s(self, key: str, free: int, now: float) -> float:
        known = self._failures.get(key)
        if known is None or known.count < free or now - known.last_at >= _FORGET_AFTER_S:
            return 0.0
        wait_s = min(2.0 ** min(known.count - free, 20), _LONGEST_WAIT_S)
        return max(0.0, known.last_at + wait_s - now)


def _keys(address: str, user: str) -> Iterable[tuple[str, int]]:
    return ((f"{address}\0{user}", _FREE_FAILURES), (address, 4 * _FREE_FAILURES))
