"""Users and sessions: passwords, cookies, the brake on guessing."""

import stat
from pathlib import Path

import pytest

from edge_agent import users
from edge_agent.database import connect
from edge_agent.sessions import LoginThrottle, Session, Sessions, load_key

PASSWORD = "correct horse battery"


def test_the_right_password_is_verified_and_no_other(tmp_path: Path) -> None:
    db = connect(tmp_path)
    users.add_user(db, "ada", PASSWORD, 1.0)
    assert users.verify(db, "ada", PASSWORD)
    assert not users.verify(db, "ada", PASSWORD + " ")
    assert not users.verify(db, "ADA", PASSWORD)
    assert not users.verify(db, "nobody", PASSWORD)
    assert not users.verify(db, "ada", "x" * 100_000)
    assert PASSWORD not in (users.find_record(db, "ada") or "")


def test_adding_again_gives_a_new_password(tmp_path: Path) -> None:
    db = connect(tmp_path)
    users.add_user(db, "ada", PASSWORD, 1.0)
    users.add_user(db, "ada", "another good one", 2.0)
    assert users.names(db) == ["ada"]
    assert users.verify(db, "ada", "another good one")
    assert not users.verify(db, "ada", PASSWORD)


@pytest.mark.parametrize("name", ["", " ada", "ada ", "a\nb", "<b>", "x" * 65, "_", "ada\0"])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(users.UserError, match="not a user name") as refused:
        users.add_user(connect(tmp_path), name, PASSWORD, 1.0)
    assert refused.value.advice


@pytest.mark.parametrize("name", ["a", "Dr. Ada", "müller@clinic.org", "O'Neill-7"])
def test_usual_names_are_taken(tmp_path: Path, name: str) -> None:
    db = connect(tmp_path)
    users.add_user(db, name, PASSWORD, 1.0)
    assert users.names(db) == [name]


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_too_short_or_long_passwords_are_refused(tmp_path: Path, password: str) -> None:
    db = connect(tmp_path)
    with pytest.raises(users.UserError, match="10 to 1024 characters"):
        users.add_user(db, "ada", password, 1.0)
    assert users.names(db) == []


def test_removing(tmp_path: Path) -> None:
    db = connect(tmp_path)
    users.add_user(db, "ada", PASSWORD, 1.0)
    users.remove_user(db, "ada")
    assert not users.verify(db, "ada", PASSWORD)
    with pytest.raises(users.UserError, match="no user 'ada'"):
        users.remove_user(db, "ada")


def test_the_key_is_private_and_stays(tmp_path: Path) -> None:
    key = load_key(tmp_path)
    assert load_key(tmp_path) == key
    assert stat.S_IMODE((tmp_path / "review.key").stat().st_mode) == 0o600


def test_a_key_cut_short_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "review.key").write_bytes(b"half")
    assert len(load_key(tmp_path)) == 32


def test_a_session_opens_until_it_expires() -> None:
    sessions = Sessions(b"k" * 32, hours=1.0)
    cookie = sessions.issue("ada", "record", 1000.0)
    opened = sessions.open(cookie, lambda _: "record", 4599.0)
    assert opened
    assert opened.user == "ada"
    assert sessions.open(cookie, lambda _: "record", 4600.0) is None


def test_forged_and_foreign_cookies_are_refused() -> None:
    sessions = Sessions(b"k" * 32, hours=1.0)
    cookie = sessions.issue("ada", "record", 0.0)
    body, mac = cookie.split(".")
    other = sessions.issue("eve", "record", 0.0)
    forged = [
        "", ".", body, f"{body}.", f"{body}.{'0' * 64}", f"{other.split('.')[0]}.{mac}", "ü.ü", f"{'A' * 9}.{mac}",
        Sessions(b"j" * 32, hours=1.0).issue("ada", "record", 0.0),
    ]  # fmt: skip
    for wrong in forged:
        assert sessions.open(wrong, lambda _: "record", 1.0) is None, wrong


def test_a_new_password_or_a_removed_user_ends_the_session() -> None:
    sessions = Sessions(b"k" * 32, hours=1.0)
    cookie = sessions.issue("ada", "record", 0.0)
    assert sessions.open(cookie, lambda _: "new record", 1.0) is None
    assert sessions.open(cookie, lambda _: None, 1.0) is None


def test_csrf_tokens_belong_to_one_session() -> None:
    sessions = Sessions(b"k" * 32, hours=1.0)
    mine, other = Session("a", "ada", 1.0), Session("b", "ada", 1.0)
    assert sessions.is_csrf_token(mine, sessions.csrf_token(mine))
    assert not sessions.is_csrf_token(mine, sessions.csrf_token(other))
    assert not sessions.is_csrf_token(mine, "")


def test_boxes_on_one_host_have_their_own_cookies() -> None:
    assert Sessions(b"k" * 32, 1.0).cookie_name != Sessions(b"j" * 32, 1.0).cookie_name


def test_the_brake_starts_at_the_fifth_failure_and_doubles() -> None:
    throttle = LoginThrottle()
    waits = []
    for _ in range(8):
        throttle.failed("10.0.0.1", "ada", 100.0)
        waits.append(throttle.wait_s("10.0.0.1", "ada", 100.0))
    assert waits == [0, 0, 0, 0, 1, 2, 4, 8]
    assert throttle.wait_s("10.0.0.1", "ada", 107.0) == 1
    assert throttle.wait_s("10.0.0.1", "ada", 100.0 + 3600.0) == 0
    assert throttle.wait_s("10.0.0.2", "ada", 100.0) == 0


def test_the_wait_is_never_longer_than_15_minutes() -> None:
    throttle = LoginThrottle()
    for _ in range(500):
        throttle.failed("10.0.0.1", "ada", 0.0)
    assert throttle.wait_s("10.0.0.1", "ada", 0.0) == 900


def test_many_names_from_one_address_are_braked_too() -> None:
    throttle = LoginThrottle()
    for number in range(20):
        throttle.failed("10.0.0.1", f"user{number}", 0.0)
    assert throttle.wait_s("10.0.0.1", "ada", 0.0) == 1
    throttle.succeeded("10.0.0.1", "ada")
    assert throttle.wait_s("10.0.0.1", "ada", 0.0) == 1


def test_success_forgets_the_names_failures() -> None:
    throttle = LoginThrottle()
    for _ in range(6):
        throttle.failed("10.0.0.1", "ada", 0.0)
    throttle.succeeded("10.0.0.1", "ada")
    assert throttle.wait_s("10.0.0.1", "ada", 0.0) == 0


def test_memory_of_failures_is_bounded() -> None:
    throttle = LoginThrottle()
    for number in range(12_000):
        throttle.failed(f"host{number}", "ada", 0.0)
    assert len(throttle._failures) == 10_000
