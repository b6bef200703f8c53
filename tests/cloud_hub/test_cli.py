"""`hub init`, `hub run`, `hub status`: a hub is made once and whole, runs, and ends without leaving anything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from benchmarks.processes import free_port
from cloud_hub import ca, config, database, setup
from cloud_hub.setup import Wish
from fleet_link import files, pki
from fleet_link.errors import SiteError
from tests.cloud_hub.hub_support import await_true, make_hub_files, needs_mosquitto

pytestmark = pytest.mark.slow

BUNDLE = Path(__file__).resolve().parents[2] / "models" / "bundles" / "phantom-tiny.bundle"
HUB = [sys.executable, "-c", "from cloud_hub.cli import main; main()"]
FLEET = [sys.executable, "-c", "from cloud_hub.fleet_cli import main; main()"]


def _wish(folder: Path, **changes: object) -> Wish:
    values: dict[str, object] = {
        "data_dir": folder,
        "host": "localhost",
        "mqtt_port": free_port(),
        "https_port": free_port(),
        "bind": "127.0.0.1",
        "bundle": BUNDLE,
    }
    return Wish(**(values | changes))  # type: ignore[arg-type]


def _is_whole(folder: Path) -> None:
    settings = config.load(folder / "hub.toml")
    paths = settings.paths
    authority = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    hub = pki.load_identity(paths.hub_key, paths.hub_certificate)
    pki.Trust(authority.pem).check(hub.certificate_der, expected_name="hub", now=time.time())
    assert len(paths.admin_token.read_text().strip()) >= 32
    connected = database.connect(paths.database)
    with connected.reading() as session:
        assert [row.release_version for row in session.query(database.Release)] == [1]
    connected.close()


def test_init_makes_a_hub_with_secrets_for_the_owner_only(tmp_path: Path) -> None:
    wish = _wish(tmp_path / "hub")
    settings = setup.initialise(wish, now=time.time())
    assert (settings.broker.port, settings.https.port) == (wish.mqtt_port, wish.https_port)
    _is_whole(tmp_path / "hub")
    for path in (tmp_path / "hub").rglob("*"):
        if path.suffix == ".key" or path.name in ("admin.token", "ca.passphrase", "root.passphrase"):
            assert path.stat().st_mode & 0o077 == 0, path
    text = (tmp_path / "hub" / "hub.toml").read_text()
    assert text.count("#") == config.default_text().count("#")


def test_a_finished_hub_and_a_strangers_folder_are_not_touched(tmp_path: Path) -> None:
    setup.initialise(_wish(tmp_path / "hub"), now=time.time())
    before = {path: path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    with pytest.raises(SiteError, match="holds a hub already") as caught:
        setup.initialise(_wish(tmp_path / "hub"), now=time.time())
    assert "hub run" in caught.value.advice
    assert before == {path: path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(SiteError, match="is not empty"):
        setup.initialise(_wish(tmp_path / "full"), now=time.time())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_an_init_cut_off_at_any_write_is_completed_with_the_same_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CutOff(BaseException):
        """Not an error that any code may handle."""

    rename, renames = os.replace, 0

    def count(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", count)
    setup.initialise(_wish(tmp_path / "whole"), now=time.time())
    assert renames > 8
    for cut in range(renames):
        folder, left = tmp_path / f"cut-{cut}", cut

        def cut_off(source: Path, target: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise CutOff
            rename(source, target)

        monkeypatch.setattr(files.os, "replace", cut_off)
        with pytest.raises(CutOff):
            setup.initialise(_wish(folder), now=time.time())
        keys = {path: path.read_bytes() for path in folder.rglob("*.key")}
        monkeypatch.setattr(files.os, "replace", rename)
        setup.initialise(_wish(folder), now=time.time())
        _is_whole(folder)
        assert {path: path.read_bytes() for path in keys} == keys


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "two words"}, "https.host|broker.host"),
        ({"host": 'quote"'}, "."),
        ({"https_port": 0}, "https.port = 0"),
    ],
)
def test_a_wrong_wish_is_refused_before_anything_is_written(
    changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SiteError, match=words):
        setup.initialise(_wish(tmp_path / "hub", **changes), now=time.time())
    assert not (tmp_path / "hub").exists()


def test_a_bundle_that_is_none_and_a_path_that_is_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "no.bundle").write_bytes(b"nothing")
    with pytest.raises(SiteError):
        setup.initialise(_wish(tmp_path / "hub", bundle=tmp_path / "no.bundle"), now=time.time())
    with pytest.raises(SiteError, match=r"no\.bundle"):
        setup.initialise(_wish(tmp_path / "no.bundle"), now=time.time())
    setup.initialise(_wish(tmp_path / "hub"), now=time.time())
    _is_whole(tmp_path / "hub")


def test_init_says_what_to_keep_apart_and_encrypt_ca_is_for_older_hubs(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    ports = ["--mqtt-port", str(free_port()), "--https-port", str(free_port())]
    made = subprocess.run(
        [*HUB, "init", "--data-dir", str(folder), *ports], capture_output=True, text=True, check=True
    ).stdout
    assert f"Keep {folder / 'ca.passphrase'} apart" in made
    assert f"{folder / 'ca' / 'root.key'} and {folder / 'root.passphrase'}" in made
    for name in ("ca.passphrase", "root.passphrase"):
        assert (folder / name).read_text().strip() not in made
    command = [*HUB, "encrypt-ca", "--config", str(folder / "hub.toml")]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, "is encrypted already" in again.stderr) == (3, True)
    settings = config.load(folder / "hub.toml")
    paths = settings.paths
    plain = pki.private_key_pem(ca.load_key(paths.ca_key, settings.ca_passphrase))
    paths.ca_key.write_bytes(plain)
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Older backups hold it as it was" in done
    _is_whole(folder)
    assert pki.is_encrypted(paths.ca_key)


def test_the_hubs_own_certificates_are_renewed_in_time_and_for_a_new_name(tmp_path: Path) -> None:
    settings = setup.initialise(_wish(tmp_path / "hub"), now=time.time())
    paths = settings.paths
    authority = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)

    def serials() -> list[int]:
        both = (paths.server_certificate, paths.hub_certificate)
        return [x509.load_pem_x509_certificate(path.read_bytes()).serial_number for path in both]

    first = serials()
    setup.renew_own_certificates(settings, authority, now=time.time() + 500 * 86400)
    assert serials() == first
    setup.renew_own_certificates(settings, authority, now=time.time() + 600 * 86400)
    second = serials()
    assert second[0] != first[0]
    assert second[1] != first[1]
    text = config.with_value((paths.data_dir / "hub.toml").read_text(), "https", "host", "hub.example")
    renamed = config.parse(text, where=paths.data_dir / "hub.toml")
    setup.renew_own_certificates(renamed, authority, now=time.time() + 600 * 86400)
    assert serials()[0] != second[0]
    assert serials()[1] == second[1]


def test_a_new_intermediate_needs_the_roots_key_which_may_be_elsewhere(tmp_path: Path) -> None:
    folder, vault = tmp_path / "hub", tmp_path / "vault"
    settings = setup.initialise(_wish(folder), now=time.time())
    paths = settings.paths
    before = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    assert len(before.certificates) == 2
    vault.mkdir()
    for path in (paths.root_key, paths.root_passphrase):
        path.rename(vault / path.name)
    key, passphrase = vault / "root.key", vault / "root.passphrase"
    # 1. Without the key, with another passphrase, with another key: nothing changes.
    pki.new_private_key(vault / "other.key")
    for given, opened_by, reason in (
        (paths.root_key, passphrase, r"root\.key cannot be read"),
        (key, settings.ca_passphrase, r"root\.key cannot be read"),
        (key, paths.root_passphrase, "passphrase of the CA's key cannot be read"),
        (vault / "other.key", passphrase, "is not the key of this hub's root"),
    ):
        with pytest.raises(SiteError, match=reason):
            setup.new_intermediate(settings, given, opened_by, now=time.time())
    assert sorted(path.name for path in paths.ca_key.parent.iterdir()) == ["ca.key", "ca.pem"]
    # 2. With both: it is there, encrypted, and the one before is still there.
    command = [*HUB, "new-intermediate", "--config", str(folder / "hub.toml"), "--root-key", str(key)]
    command += ["--root-passphrase", str(passphrase)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    after = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    assert after.certificates[:2] == before.certificates
    assert f"It signs from {after.issuers[1].signs_from:%Y-%m-%d} on" in made.stdout
    assert pki.is_encrypted(paths.ca_key.with_name("ca-2.key"))
    assert after.issuer_at(time.time()).certificate == before.issuers[0].certificate
    # 3. Not twice by mistake.
    with pytest.raises(SiteError, match="a new intermediate already"):
        setup.new_intermediate(settings, key, passphrase, now=time.time())


def test_a_new_intermediate_cut_off_at_any_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class CutOff(BaseException):
        """Not an error that any code may handle."""

    def cut_off(*_: object) -> None:
        raise CutOff

    for name in ("link", "replace"):  # of the key; of ca.pem
        files = make_hub_files(tmp_path / name)
        paths, passphrase = files.config.paths, files.config.ca_passphrase
        with monkeypatch.context() as cut:
            cut.setattr(os, name, cut_off)
            with pytest.raises(CutOff):
                setup.new_intermediate(files.config, paths.root_key, paths.root_passphrase, now=time.time())
        found = ca.load(paths.ca_key, paths.ca_certificate, passphrase)
        assert found.certificates == files.authority.certificates
        key = paths.ca_key.with_name("ca-2.key")
        kept = key.read_bytes() if key.exists() else None
        assert (kept is None) is (name == "link")
        made = setup.new_intermediate(files.config, paths.root_key, paths.root_passphrase, now=time.time())
        found = ca.load(paths.ca_key, paths.ca_certificate, passphrase)
        assert found.issuers[1].certificate == made.certificate
        assert kept in (None, key.read_bytes())


class Started:
    """`hub run` as its own process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_path = str(folder / "hub.toml")
        self.paths = config.load(folder / "hub.toml").paths
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*HUB, "run", "--config", self.config_path], stderr=(self.folder / "log").open("ab"))

    def status(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*HUB, "status", "--config", self.config_path, "--json"], capture_output=True, text=True, check=False
        )

    def await_answer(self) -> None:
        await_true(lambda: self.process.poll() is not None or self.status().returncode == 0, within_s=60)
        assert self.process.poll() is None, (self.folder / "log").read_text()

    def broker_pid(self) -> int:
        return int((self.paths.broker / "mosquitto.pid").read_text())

    def restart(self) -> None:
        self.process = self._spawn()
        self.await_answer()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Started]:
    setup.initialise(_wish(tmp_path / "hub"), now=time.time())
    hub = Started(tmp_path / "hub")
    hub.await_answer()
    yield hub
    hub.close()


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@needs_mosquitto
def test_a_hub_runs_answers_survives_a_kill_and_ends_clean(started: Started) -> None:
    shown = json.loads(started.status().stdout)
    assert shown["broker_running"] is True
    fleet = [*FLEET, "--config", str(started.folder / "fleet.toml")]
    assert subprocess.run([*fleet, "site", "add", "north"], check=False).returncode == 0
    assert subprocess.run([*fleet, "device", "add", "box-a", "--site", "north"], check=False).returncode == 0

    killed = started.broker_pid()
    started.process.kill()
    started.process.wait()
    await_true(lambda: not _alive(killed))
    assert started.status().returncode == 3
    started.restart()
    assert json.loads(started.status().stdout)["devices"] == {"awaited": 1}

    broker = started.broker_pid()
    assert broker != killed
    started.process.send_signal(signal.SIGTERM)
    assert started.process.wait(30) == 0
    assert not _alive(broker)


@needs_mosquitto
def test_a_killed_broker_comes_back_under_a_running_hub(started: Started) -> None:
    pid = started.broker_pid()
    os.kill(pid, signal.SIGKILL)
    await_true(lambda: started.broker_pid() != pid and _alive(started.broker_pid()), within_s=30)
    started.await_answer()


def test_the_command_tells_what_is_wrong_in_two_lines(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*HUB, "run", "--config", str(tmp_path / "none.toml")], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr.splitlines()[0].endswith("none.toml: No such file or directory")
    assert "hub init" in ended.stderr.splitlines()[1]
    assert len(ended.stderr.splitlines()) == 2
