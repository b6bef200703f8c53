"""What goes to systemd and to logs: the state, and never the text of an exception."""

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fleet_link import notify

SECRET = "DOE^JOHN"


def _record() -> logging.LogRecord:
    try:
        float(SECRET)
    except ValueError:
        return logging.LogRecord("box", logging.ERROR, "file", 1, "series %d failed", (7,), sys.exc_info())
    raise AssertionError


def test_the_journal_gets_where_and_what_kind_but_no_values() -> None:
    sent: list[tuple[str, dict[str, Any]]] = []

    class Journal:
        @staticmethod
        def send(message: str, **fields: Any) -> None:
            sent.append((message, fields))

    notify._Journal(Journal).handle(_record())
    ((message, fields),) = sent
    assert message.startswith("box: series 7 failed")
    assert "ValueError" in message
    assert fields["PRIORITY"] == 3
    assert SECRET not in repr(sent)


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(5.0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield made


def test_systemd_hears_that_the_service_is_ready(listening: socket.socket) -> None:
    notify.ready("here")
    assert listening.recv(100) == b"READY=1\nSTATUS=here"
    listening.close()
    notify.stopping()  # nobody listens any more: no error


def test_systemd_that_does_not_read_holds_nothing_up_and_hears_the_next_sign_of_life(listening: socket.socket) -> None:
    for _ in range(1000):  # more than any socket holds
        notify.watchdog()
    listening.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while listening.recv(100):
            pass
    notify.watchdog()
    assert listening.recv(100) == b"WATCHDOG=1"
