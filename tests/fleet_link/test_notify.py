"""What goes to systemd and to logs: the state, and never the text of an exception."""

import logging
import socket
import sys
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


def test_a_plain_datagram_reaches_systemd_where_systemd_python_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "_systemd", None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(5.0)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify.ready("here")
        assert listening.recv(100) == b"READY=1\nSTATUS=here"
    notify.stopping()  # nobody listens any more: no error
