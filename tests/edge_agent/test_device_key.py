"""The device's key at rest: made, found and made anew encrypted; locked, it keeps the box from its hub and from nothing else."""

import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import daemon, database, device_key, doctor, identity, status
from edge_agent.device_key import CREDENTIAL, LockedError
from edge_agent.doctor import Level
from edge_agent.link import open_bus
from fleet_link import pki
from fleet_link.errors import SiteError
from tests.edge_agent.link_support import DEVICE, Box, make_box
from tests.fleet_link.mosquitto_support import TestAuthority

PASSPHRASE = b"of the TPM"
AUTHORITY = TestAuthority()


@pytest.fixture(autouse=True)
def no_credential_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    monkeypatch.setattr(device_key, "OPENED", tmp_path / "opened")
    monkeypatch.setattr(device_key, "SEALED", tmp_path / "sealed")


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    """Its key lies in clear."""
    made = make_box(tmp_path, AUTHORITY)
    yield made
    made.db.close()


@pytest.fixture
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As systemd gives it to the service."""
    (tmp_path / "credentials").mkdir()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    path = tmp_path / "credentials" / CREDENTIAL
    path.write_bytes(PASSPHRASE + b"\n")
    return path


def key_of(box: Box) -> Path:
    return identity.folder(box.data_dir).key


def said_of(box: Box, name: str) -> doctor.Check:
    (check,) = [check for check in doctor.examine(box.config) if check.name == name]
    return check


def test_the_passphrase_is_what_systemd_gives_the_service_or_has_opened_for_root(credential: Path) -> None:
    device_key.OPENED.write_bytes(b"of root\n")
    device_key.SEALED.touch()
    assert device_key.passphrase() == PASSPHRASE
    credential.unlink()
    assert device_key.passphrase() == b"of root"
    device_key.OPENED.unlink()
    assert device_key.passphrase() is None


def test_a_passphrase_that_cannot_be_used_is_refused_and_no_key_is_made_in_clear_instead(credential: Path) -> None:
    credential.write_bytes(b"\n")
    with pytest.raises(SiteError, match="is empty"):
        device_key.passphrase()
    credential.unlink()
    credential.mkdir()
    with pytest.raises(SiteError, match="cannot be read"):
        device_key.passphrase()


def test_the_daemon_encrypts_a_key_that_lies_in_clear_and_opens_it_at_its_next_start(
    box: Box, credential: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    waiting = identity.renewed(box.data_dir)
    waiting.path.mkdir()
    pki.new_private_key(waiting.key)
    for _ in range(2):
        found = daemon._enrolled(box.config)
        assert found is not None
        assert found.identity.private_key.private_numbers() == box.enrolled.identity.private_key.private_numbers()
        assert pki.is_encrypted(key_of(box))
        assert pki.is_encrypted(waiting.key)
        assert key_of(box).stat().st_mode & 0o777 == 0o600
    assert caplog.text.count("device.key is encrypted from now on") == 2  # the one in use, the one that waits
    assert PASSPHRASE.decode() not in caplog.text + repr(found) + repr(open_bus(found, box.config.hub)._config)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_while_it_encrypts_the_key_is_whole(box: Box, moment: str) -> None:
    """Killed around the one step that puts the encrypted key in the place of the one in clear."""
    script = (
        "import os, signal, sys; from pathlib import Path; from edge_agent import device_key;"
        " replace, moment = os.replace, sys.argv[2];"
        " die = lambda: os.kill(os.getpid(), signal.SIGKILL);"
        " os.replace = lambda *paths: die() if moment == 'before' else (replace(*paths), die());"
        " device_key.protect(Path(sys.argv[1]), b'of the TPM')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(key_of(box)), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert pki.is_encrypted(key_of(box)) is (moment == "after")
    assert identity.load(box.data_dir, PASSPHRASE).identity.name == DEVICE


def test_no_copy_in_clear_of_a_key_that_was_being_written_stays(box: Box) -> None:
    copy = key_of(box).with_name(".device.key-abcd1234.tmp")
    shutil.copy(key_of(box), copy)
    identity.protect(box.data_dir, PASSPHRASE)
    assert not copy.exists()
    assert pki.is_encrypted(key_of(box))


def test_a_damaged_key_of_a_half_done_renewal_keeps_nobody_from_the_hub(box: Box, credential: Path) -> None:
    spare = identity.renewed(box.data_dir).key
    spare.parent.mkdir()
    spare.write_bytes(b"-----BEGIN")
    enrolled = daemon._enrolled(box.config)
    assert enrolled is not None
    assert pki.is_encrypted(key_of(box))


def test_an_opened_passphrase_whose_sealed_one_was_removed_encrypts_nothing(
    credential: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the next boot nothing would open it."""
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    device_key.OPENED.write_bytes(PASSPHRASE)
    assert device_key.passphrase() is None


def test_a_locked_key_keeps_the_box_from_its_hub_alone_and_is_told_until_it_opens(box: Box, credential: Path) -> None:
    assert daemon._enrolled(box.config) is not None
    credential.unlink()
    assert daemon._enrolled(box.config) is None
    (alarm,) = database.alarms(box.db)
    assert alarm.startswith("no link to the hub: device.key is encrypted, and its passphrase is not here")
    assert "enroll --replace" in alarm
    gathered = status.gather(box.config)
    assert (gathered.device, gathered.certificate_days_left, gathered.alarms) == (DEVICE, 89, [alarm])
    with pytest.raises(LockedError):
        identity.load(box.data_dir)
    credential.write_bytes(PASSPHRASE)
    assert daemon._enrolled(box.config) is not None
    assert database.alarms(box.db) == []


def test_another_passphrase_opens_nothing_and_is_not_told(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    identity.protect(box.data_dir, PASSPHRASE)
    with pytest.raises(SiteError, match=r"device\.key cannot be read") as caught:
        identity.load(box.data_dir, b"another one")
    assert "another one" not in str(caught.value) + caught.value.advice + caplog.text


def test_without_its_passphrase_the_bus_refuses_a_locked_key_and_asks_nobody(box: Box, tmp_path: Path) -> None:
    """On a terminal of its own OpenSSL would ask, and wait for ever."""
    identity.protect(box.data_dir, PASSPHRASE)
    script = (
        "import os, pty, sys; pid, terminal = pty.fork()\n"
        "if pid == 0:\n"
        "    from pathlib import Path; from fleet_link.bus import Bus, BusConfig; here = Path(sys.argv[1])\n"
        "    from fleet_link.errors import SiteError\n"
        "    try: Bus(BusConfig('localhost', 1, 'box-1', here / 'ca.pem', here / 'device.pem', here / 'device.key'), []).start()\n"
        "    except SiteError: os._exit(7)\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    command = [sys.executable, "-c", script, str(identity.folder(box.data_dir).path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "7"


def test_a_draft_that_nothing_opens_any_more_is_made_anew(box: Box) -> None:
    here = identity.draft(box.data_dir)
    here.path.mkdir()
    pki.new_private_key(here.key, passphrase=PASSPHRASE)
    assert not pki.is_encrypted(_made_at(here.key, None))
    pki.new_private_key(_gone(here.key), passphrase=PASSPHRASE)
    before = device_key.load(here.key, PASSPHRASE).private_numbers()
    assert device_key.load(_made_at(here.key, PASSPHRASE), PASSPHRASE).private_numbers() == before


def _made_at(path: Path, passphrase: bytes | None) -> Path:
    identity._key_at(path, passphrase)
    return path


def _gone(path: Path) -> Path:
    path.unlink()
    return path


def test_doctor_says_how_the_key_lies(box: Box, credential: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    clear = said_of(box, "device key")
    assert (clear.level, clear.finding.partition(",")[0]) == (Level.OK, "in clear")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name == "systemd-creds" else None)
    assert said_of(box, "device key").level is Level.WARNING
    identity.protect(box.data_dir, PASSPHRASE)
    for sealed, said in (
        (b"", "encrypted; systemd opens it"),
        (b"Whxqht+dQJax1aZeCGLxmgAAAAEAAAAM", "encrypted; the host's key on this disk opens it"),
        (b"k6iUCUh0RJCQyvL8k8q1UyAAAAABAAAADAAA", "encrypted; the TPM of this machine opens it"),
    ):
        device_key.SEALED.write_bytes(sealed)
        check = said_of(box, "device key")
        assert (check.level, check.finding.startswith(said)) == (Level.OK, True)
    assert said_of(box, "identity").level is Level.OK
    credential.unlink()
    locked = said_of(box, "device key")
    assert (locked.level, locked.advice.startswith("run doctor as root")) == (Level.WARNING, True)
