"""A hub restored from its backup on a fresh folder: its boxes go on, and without the passphrase kept apart nothing starts."""

import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_hub import ca, config, setup
from fleet_link import pki
from fleet_link.errors import SiteError
from tests.cloud_hub.box_twin import BoxTwin
from tests.cloud_hub.hub_support import make_hub_files, needs_mosquitto
from tests.cloud_hub.round_support import needs_bundle
from tests.cloud_hub.test_service import HubProcess

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubProcess]:
    made = HubProcess(tmp_path)
    yield made
    made.close()


def back_up(data_dir: Path, to: Path) -> None:
    """What the README says, in its order."""
    to.mkdir()
    with sqlite3.connect(data_dir / "hub.db") as source, sqlite3.connect(to / "hub.db") as target:
        source.backup(target)
    named = re.search(r"cp -a /srv/hub/\{([\w./,-]+)\} /backup/", README)
    assert named is not None
    for name in named[1].split(","):
        copy = shutil.copytree if (data_dir / name).is_dir() else shutil.copy2
        copy(data_dir / name, to / name)


def heard(hub: HubProcess, box: BoxTwin) -> bool:
    """Let it report in; True once the restored hub shows that it has heard it."""
    box.heartbeat()
    return hub.api("GET", f"/devices/{box.name}")["state"] == "online"


@pytest.mark.slow
@needs_bundle
@needs_mosquitto
def test_a_restored_hub_is_the_hub_of_its_boxes(hub: HubProcess, tmp_path: Path) -> None:
    hub.start()
    box, revoked = hub.add_box("a"), hub.add_box("b")
    hub.api("POST", "/devices/b/revoke")
    hub.until(lambda: heard(hub, box))
    data_dir, backup = hub.config.paths.data_dir, tmp_path / "backup"
    back_up(data_dir, backup)
    passphrase = hub.config.ca_passphrase.read_bytes()
    hub.kill()
    shutil.rmtree(data_dir)
    shutil.copytree(backup, data_dir)
    # 1. What was kept apart is missing: the hub says so and does not start.
    assert hub.spawn().wait(60) == 3
    assert "the passphrase of the CA's key cannot be read" in hub.log()
    # 2. With it: connected, heard, and a new box can be let in.
    (data_dir / "ca.passphrase").write_bytes(passphrase)
    hub.start()
    hub.until(lambda: heard(hub, box))
    assert not revoked.bus.connected
    assert hub.api("GET", "/devices/b")["state"] == "revoked"
    assert str(hub.api("POST", "/devices", {"device": "c", "site": "north"})["token"]).startswith("wr1.")


def test_a_backup_made_as_the_readme_says_does_not_open_the_ca(tmp_path: Path) -> None:
    hub = HubProcess(tmp_path)
    back_up(hub.config.paths.data_dir, tmp_path / "backup")
    hub.close()
    whole = [path.read_bytes() for path in (tmp_path / "backup").rglob("*") if path.is_file()]
    for kept_apart in (hub.config.ca_passphrase, hub.config.paths.root_passphrase):
        passphrase = kept_apart.read_bytes().strip()
        assert len(passphrase) >= 32
        assert not any(passphrase in content for content in whole)
    for name in ("ca.key", "root.key"):
        assert pki.is_encrypted(tmp_path / "backup" / "ca" / name)


def test_a_hub_of_before_is_encrypted_with_one_command(tmp_path: Path) -> None:
    files = make_hub_files(tmp_path, single_ca=True)
    paths = files.config.paths
    for _ in range(2):  # without a passphrase it goes on working
        plain = ca.load(paths.ca_key, paths.ca_certificate, files.config.ca_passphrase)
    assert not pki.is_encrypted(paths.ca_key)
    setup.encrypt_ca(files.config)
    assert pki.is_encrypted(paths.ca_key)
    assert files.config.ca_passphrase.stat().st_mode & 0o777 == 0o600
    encrypted = ca.load(paths.ca_key, paths.ca_certificate, files.config.ca_passphrase)
    assert encrypted.issuers[0].key.private_numbers() == plain.issuers[0].key.private_numbers()
    with pytest.raises(SiteError, match="is encrypted already"):
        setup.encrypt_ca(files.config)


def test_a_credential_of_systemd_is_read_and_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make_hub_files(tmp_path / "hub")
    text = config.with_value(config.default_text(), "certificates", "ca_passphrase", "credential:ca")
    settings = config.parse(text, where=tmp_path / "hub" / "hub.toml")
    for credentials in (None, tmp_path / "credentials"):
        if credentials is not None:
            credentials.mkdir()
            monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
        else:
            monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
        with pytest.raises(SiteError, match="passphrase of the CA's key cannot be read"):
            setup.encrypt_ca(settings)
    assert not pki.is_encrypted(files.config.paths.ca_key)
    (tmp_path / "credentials" / "ca").write_text("of the TPM\n")
    setup.encrypt_ca(settings)
    assert setup.make_identity(settings, now=time.time()).sha256 == files.authority.sha256
