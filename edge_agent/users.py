"""Reviewers of this box: names and scrypt password records.

Reads and writes the users table.
Never keeps, logs or returns a password.
Source: RFC 7914 (scrypt); cost as in OWASP's Password Storage Cheat Sheet (N=2^15, r=8, p=3: 32 MiB, about 0.2 s).
"""

import hashlib
import hmac
import re
import secrets
import sqlite3

from fleet_link.errors import SiteError

MIN_PASSWORD_CHARACTERS = 10
MAX_PASSWORD_CHARACTERS = 1024
_NAME = re.compile(r"[^\W_](?:[\w .@'-]{0,62}[\w.])?")
_LOG2_N, _R, _P = 15, 8, 3
_SALT_BYTES = 16
_MAX_MEMORY_BYTES = 128 * 1024 * 1024


class UserError(SiteError):
    """A name or password that cannot be taken."""


def add_user(db: sqlite3.Connection, name: str, password: str, now: float) -> None:
    """Let `name` review, or give it a new password; every session opened with the old one ends.

    Raises UserError: name not fit, password too short or too long.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is not a user name: 1 to 64 letters, digits, blanks and . @ ' - _",
            advice="it is shown beside each verdict: use the reviewer's name or hospital login",
        )
    db.execute(
        "INSERT INTO users VALUES (?, ?, ?) ON CONFLICT(name) DO UPDATE SET password = excluded.password",
        (name, password_record(password), now),
    )


def remove_user(db: sqlite3.Connection, name: str) -> None:
    """End its logins; its verdicts stay. Raises UserError on an unknown name."""
    if db.execute("DELETE FROM users WHERE name = ?", (name,)).rowcount == 0:
        raise UserError(f"there is no user {name!r}")


def names(db: sqlite3.Connection) -> list[str]:
    return [str(row["name"]) for row in db.execute("SELECT name FROM users ORDER BY name")]


def find_record(db: sqlite3.Connection, name: str) -> str | None:
    row = db.execute("SELECT password FROM users WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row["password"])


def verify(db: sqlite3.Connection, name: str, password: str) -> bool:
    """True if the password is the user's. An unknown name costs the same time as a wrong password."""
    if len(password) > MAX_PASSWORD_CHARACTERS:
        return False
    record = find_record(db, name)
    _, log2_n, r, p, salt, expected = (record or _NOBODY).split("$")
    found = _scrypt(password, bytes.fromhex(salt), (int(log2_n), int(r), int(p)))
    return hmac.compare_digest(found.hex(), expected) and record is not None


def password_record(password: str) -> str:
    """`scrypt$log2(N)$r$p$salt$hash`. Raises UserError if the password is too short or too long."""
    if not MIN_PASSWORD_CHARACTERS <= len(password) <= MAX_PASSWORD_CHARACTERS:
        raise UserError(
            f"a password has {MIN_PASSWORD_CHARACTERS} to {MAX_PASSWORD_CHARACTERS} characters",
            advice="four unrelated words are easy to keep and hard to guess",
        )
    salt = secrets.token_bytes(_SALT_BYTES)
    return f"scrypt${_LOG2_N}${_R}${_P}${salt.hex()}${_scrypt(password, salt, (_LOG2_N, _R, _P)).hex()}"


def _scrypt(password: str, salt: bytes, cost: tuple[int, int, int]) -> bytes:
    log2_n, r, p = cost
    return hashlib.scrypt(password.encode(), salt=salt, n=1 << log2_n, r=r, p=p, maxmem=_MAX_MEMORY_BYTES, dklen=32)


_NOBODY = f"scrypt${_LOG2_N}${_R}${_P}${'00' * _SALT_BYTES}${'00' * 32}"
