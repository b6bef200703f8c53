"""A box renews its certificate by itself: with the hub's own HTTPS side and broker, cut off at every step, refused, away."""

import itertools
import json
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from benchmarks.processes import free_port
from cloud_hub import registry, setup
from cloud_hub.broker import Broker
from cloud_hub.ca import Authority, Issuer
from cloud_hub.database import Certificate
from edge_agent import database, device_key, hub_change, identity, ledger, renewal, status
from edge_agent.identity import Enrolled
from edge_agent.link import Link
from edge_agent.renewal import Renewal
from edge_agent.rounds import Event
from fleet_link import pki
from fleet_link.bus import BusConfig
from fleet_link.errors import LinkError, SiteError
from fleet_link.files import write_durably
from fleet_link.messages import Heartbeat, RoundClosed
from tests.cloud_hub.hub_support import HttpsHub, make_hub_files, needs_mosquitto
from tests.edge_agent.link_support import DEVICE, Box, HubTwin, make_box, make_plan
from tests.fleet_link.mosquitto_support import TestAuthority

pytestmark = [needs_mosquitto, pytest.mark.slow]
DAY_S = 86_400.0


class House:
    """The hub's enrolment and broker, a twin of its link, and one box with its link thread."""

    def __init__(self, folder: Path, *, single_ca: bool = False) -> None:
        self.files = make_hub_files(folder / "hub", single_ca=single_ca)
        self.files.add_device(DEVICE)
        self.https = HttpsHub(self.files)
        self.broker = Broker(self.files.config, write_access=self.files.write_access, on_refused=lambda reason: None)
        self.broker.start()
        paths = self.files.config.paths
        hub = pki.load_identity(paths.hub_key, paths.hub_certificate)
        port = self.files.config.broker.port
        bus = BusConfig("localhost", port, "hub", paths.ca_certificate, paths.hub_certificate, paths.hub_key)
        (folder / "twin").mkdir()
        self.hub = HubTwin(bus, hub, pki.Trust(self.files.authority.pem), folder / "twin")
        self.folder = folder
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def enrol(self, *, days_ago: float) -> Box:
        """A box whose certificate of 30 days was issued so long ago."""
        self.https.now = time.time() - days_ago * DAY_S
        with self.files.database.writing() as session:
            token = registry.new_token(
                session, DEVICE, config=self.files.config, authority=self.files.authority, now=self.https.now
            )
        (self.folder / "data").mkdir()
        identity.enroll(token.text(), self.folder / "data", passphrase=device_key.passphrase())
        self.https.now = time.time()
        url = {"hub": {"url": self.files.config.url}}
        self.box = make_box(self.folder, TestAuthority(), self.files.config.broker.port, **url)
        return self.box

    def start_link(self) -> None:
        link = Link(self.box.config, self.box.enrolled, self.box.holder)
        self._thread = threading.Thread(target=link.run, args=(self._stop,))
        self._thread.start()

    def until(self, fact: Callable[[], object]) -> None:
        self.hub.until(fact)

    def heard(self) -> int:
        return len(self.hub.of(Heartbeat))

    def certificates(self) -> list[str]:
        with self.files.database.reading() as session:
            return [row.serial for row in session.query(Certificate)]

    def revoke(self, serial: str) -> None:
        with self.files.database.writing() as session:
            session.get_one(Certificate, serial).revoked_at = time.time()
        self.broker.reload()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.hub.stop()
        self.broker.stop()
        self.https.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def serial(enrolled: Enrolled) -> str:
    return pki.serial_hex(x509.load_der_x509_certificate(enrolled.identity.certificate_der))


def names(folder: identity.Folder) -> set[str]:
    return {path.name for path in folder.path.iterdir()} if folder.path.exists() else set()


@pytest.mark.parametrize("is_encrypted", [False, True])
def test_the_link_goes_on_with_a_renewed_certificate(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_encrypted: bool
) -> None:
    if is_encrypted:
        (tmp_path / device_key.CREDENTIAL).write_text("of the TPM\n")
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    box = house.enrol(days_ago=21.0)
    before = serial(box.enrolled)
    house.start_link()
    house.until(lambda: house.heard() >= 2)
    Renewal(box.config, box.enrolled).step(box.db)
    house.until(lambda: serial(box.enrolled) != before)
    heard = house.heard()
    house.until(lambda: house.heard() >= heard + 2)
    assert house.hub.sequences == sorted(set(house.hub.sequences))
    assert house.certificates() == [before, serial(box.enrolled)]
    assert pki.is_encrypted(box.enrolled.folder.key) is is_encrypted
    on_disk = identity.load(box.data_dir, device_key.passphrase())
    assert serial(on_disk) == serial(box.enrolled)
    assert 29.0 < on_disk.life.days_left(time.time()) <= 30.0
    assert on_disk.folder.key.stat().st_mode & 0o777 == 0o600
    assert names(identity.renewed(box.data_dir)) == {"ca.pem"}
    assert status.gather(box.config).notices == []
    assert house.https.refusals() == []


def test_the_running_box_does_it_by_itself(house: House) -> None:
    """The daemon as it is started in a hospital, with a certificate that has ended: nobody does anything."""
    box = house.enrol(days_ago=60.0)
    before = serial(box.enrolled)
    page, dicom = free_port(), free_port()
    (house.folder / "edge-agent.toml").write_text(
        f'[box]\ndata_dir = "{box.data_dir}"\n[dicom]\nport = {dicom}\nbind = "127.0.0.1"\nmin_free_bytes = 0\n'
        f'[inference]\nbundle = "{box.shipped}"\nproviders = ["CPUExecutionProvider"]\n[review]\nport = {page}\n'
        f'[hub]\nurl = "{house.files.config.url}"\nmqtt_port = {house.files.config.broker.port}\nheartbeat_s = 0.5\n'
    )
    command = [sys.executable, "-m", "edge_agent.cli", "run", "--config", str(house.folder / "edge-agent.toml")]
    with (house.folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        house.hub.until(lambda: house.heard() >= 3 or process.poll() is not None, timeout_s=60.0)
        said = (house.folder / "log").read_text()
        assert process.poll() is None, said
        assert "the certificate is renewed, for 30 days" in said
        assert serial(identity.load(box.data_dir)) != before
        assert house.hub.of(Heartbeat)[-1].notices == ()
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_before_it_is_due_nothing_is_asked(house: House) -> None:
    box = house.enrol(days_ago=19.9)
    Renewal(box.config, box.enrolled).step(box.db)
    assert not identity.renewed(box.data_dir).path.exists()
    start, end = box.enrolled.life
    assert 2 / 3 <= (renewal.due_at(box.enrolled) - start) / (end - start) <= 2 / 3 + renewal.SPREAD
    assert renewal.due_at(box.enrolled) == renewal.due_at(identity.load(box.data_dir))


def test_a_box_that_was_away_for_months_comes_back(house: House) -> None:
    box = house.enrol(days_ago=200.0)
    assert "has expired" in status.gather(box.config).notices[0]
    house.start_link()
    Renewal(box.config, box.enrolled).step(box.db)
    house.until(house.heard)
    assert status.gather(box.config).notices == []


def test_an_answer_that_was_lost_is_given_again(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    box = house.enrol(days_ago=21.0)
    with monkeypatch.context() as cut:
        cut.setattr(identity, "_check_certificate", lost)
        with pytest.raises(LinkError):
            identity.renew(box.enrolled, box.config.hub)
    assert len(house.certificates()) == 2
    assert identity.waiting(box.enrolled, time.time()) is None
    identity.renew(identity.load(box.data_dir), box.config.hub)
    waiting = identity.waiting(box.enrolled, time.time())
    assert waiting is not None
    assert house.certificates()[1:] == [serial(waiting)]


def lost(*_: object) -> None:
    raise LinkError("the line broke off")


def test_a_damaged_renewal_is_asked_for_again(house: House) -> None:
    box = house.enrol(days_ago=21.0)
    identity.renew(box.enrolled, box.config.hub)
    new = identity.renewed(box.data_dir)
    new.certificate.write_bytes(b"half")
    assert identity.waiting(box.enrolled, time.time()) is None
    Renewal(box.config, box.enrolled).step(box.db)
    assert identity.waiting(box.enrolled, time.time()) is not None
    assert len(house.certificates()) == 2


@pytest.mark.parametrize("cut_at", ["device.pem", "device.key", "former.pem"])
def test_a_power_cut_while_it_moves_leaves_a_whole_identity(
    house: House, monkeypatch: pytest.MonkeyPatch, cut_at: str
) -> None:
    """Before each file of the move: the identity is the former one or the new one, and both may speak."""
    box = house.enrol(days_ago=21.0)
    before = serial(box.enrolled)
    identity.renew(box.enrolled, box.config.hub)
    waiting = identity.waiting(box.enrolled, time.time())
    assert waiting is not None

    class PowerCutError(Exception):
        pass

    def until_cut(real: Callable[..., None], target: int) -> Callable[..., None]:
        def step(*arguments: Path, **options: object) -> None:
            if arguments[target].name == cut_at:
                raise PowerCutError
            real(*arguments, **options)

        return step

    with monkeypatch.context() as cut:
        cut.setattr(identity, "write_durably", until_cut(identity.write_durably, 0))
        cut.setattr(identity, "move_durably", until_cut(identity.move_durably, 1))
        with pytest.raises(PowerCutError):
            identity.take_over(box.enrolled, waiting)
    moved = serial(waiting) if cut_at == "device.pem" else before
    assert serial(identity.load(box.data_dir)) == moved
    identity.settle(box.data_dir)
    box.enrolled = identity.load(box.data_dir)
    assert serial(box.enrolled) == moved
    house.start_link()
    house.until(lambda: house.heard() and serial(box.enrolled) == serial(waiting))
    assert serial(identity.load(box.data_dir)) == serial(waiting)


def test_a_certificate_that_the_broker_refuses_does_not_cost_the_one_in_use(house: House) -> None:
    box = house.enrol(days_ago=21.0)
    before = serial(box.enrolled)
    identity.renew(box.enrolled, box.config.hub)
    house.revoke(house.certificates()[1])
    house.start_link()
    house.until(lambda: any("does not take the renewed" in text for text in status.gather(box.config).notices))
    heard = house.heard()
    house.until(lambda: house.heard() > heard)
    assert serial(identity.load(box.data_dir)) == serial(box.enrolled) == before


class Seconds:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_hub_that_is_away_is_told_after_a_day_only(house: House) -> None:
    box = house.enrol(days_ago=21.0)
    house.https.close()
    seconds = Seconds()
    thread = Renewal(box.config, box.enrolled, seconds=seconds)
    for hour in range(24):
        seconds.now = 1000.0 + hour * 3600.0
        thread.step(box.db)
    assert database.notices(box.db) == []
    seconds.now += 3600.0
    thread.step(box.db)
    (told,) = database.notices(box.db)
    assert "is not renewed: the hub cannot be reached" in told
    assert "firewall" in told
    thread.run(stopped())
    assert database.notices(box.db) == []


def stopped() -> threading.Event:
    stop = threading.Event()
    stop.set()
    return stop


def test_failures_are_tried_again_ever_more_slowly(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    box = house.enrol(days_ago=21.0)
    asked: list[float] = []
    seconds = Seconds()

    def away(*_: object) -> None:
        asked.append(seconds.now)
        raise LinkError("away")

    monkeypatch.setattr(identity, "renew", away)
    thread = Renewal(box.config, box.enrolled, seconds=seconds)
    while seconds.now < 1000.0 + 6 * 3600.0:
        thread.step(box.db)
        seconds.now += 5.0
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert gaps[0] <= 30.0
    assert 1800.0 <= gaps[-1] <= 3605.0
    assert 8 <= len(gaps) <= 20


def test_a_refusal_is_told_at_once_on_both_sides(house: House) -> None:
    box = house.enrol(days_ago=21.0)
    with house.files.database.writing() as session:
        registry.revoke(session, DEVICE, now=time.time())
    Renewal(box.config, box.enrolled).step(box.db)
    (told,) = status.gather(box.config).notices
    assert f"device {DEVICE} is revoked" in told
    assert house.https.refusals()[0][:2] == (DEVICE, "renewal")
    assert identity.is_enrolled(box.data_dir)


def test_enrolling_anew_ends_a_renewal_that_was_on(house: House) -> None:
    box = house.enrol(days_ago=21.0)
    identity.renew(box.enrolled, box.config.hub)
    with house.files.database.writing() as session:
        token = registry.new_token(
            session, DEVICE, config=house.files.config, authority=house.files.authority, now=time.time()
        )
    anew = identity.enroll(token.text(), box.data_dir, replace=True)
    assert not identity.renewed(box.data_dir).path.exists()
    assert house.certificates()[2:] == [serial(anew)]


def sealed_round(box: Box) -> None:
    path = "updates/round-1.sealed"
    write_durably(box.data_dir / path, b"sealed with the former certificate")
    ledger.invite(box.db, make_plan("b" * 64, b"k" * 32), time.time())
    ledger.apply(box.db, box.data_dir, "round-1", Event.ADMITTED, time.time(), ledger.Outcome(examples=2))
    offer = ledger.offer_of(box.data_dir / path, "round-1", DEVICE)
    sealed = ledger.Outcome(update=offer, update_path=path)
    ledger.apply(box.db, box.data_dir, "round-1", Event.SEALED, time.time(), sealed)


@pytest.mark.parametrize(("days_ago", "state"), [(21.0, "uploading"), (31.0, "training")])
def test_what_the_former_certificate_has_sealed_travels_on_until_it_ends(
    house: House, days_ago: float, state: str
) -> None:
    box = house.enrol(days_ago=days_ago)
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    sealed_round(box)
    identity.renew(box.enrolled, box.config.hub)
    waiting = identity.waiting(box.enrolled, time.time())
    assert waiting is not None
    identity.take_over(box.enrolled, waiting)
    for _ in range(2):  # after the renewal, and at the next start
        hub_change.follow(box.db, box.data_dir, identity.load(box.data_dir), time.time())
        assert box.state_of("round-1") == state


def test_no_key_is_readable_by_others(house: House) -> None:
    box = house.enrol(days_ago=21.0)
    identity.renew(box.enrolled, box.config.hub)
    new = identity.renewed(box.data_dir)
    assert (new.path.stat().st_mode & 0o777, new.key.stat().st_mode & 0o777) == (0o700, 0o600)
    with pytest.raises(SiteError):
        pki.new_private_key(new.key)
    assert "PRIVATE" not in json.dumps([path.read_text() for path in new.path.glob("*.pem")])


# --- the hub's intermediates ----------------------------------------------------------------------


def make_next_intermediate(house: House, *, days_ago: float) -> Issuer:
    """The running hub has it, and its link signs with it once it has been shown for long enough."""
    settings, now = house.files.config, time.time()
    paths, authority = settings.paths, house.files.authority
    made = setup.new_intermediate(settings, paths.root_key, paths.root_passphrase, now=now - days_ago * DAY_S)
    assert setup.take_up_intermediate(settings, authority)
    house.broker.reload()
    key = pki.load_private_key(paths.hub_key)
    certificate = authority.issue_hub(key.public_key(), days=30, now=now)
    house.hub.identity = pki.Identity("hub", key, certificate.public_bytes(Encoding.DER))
    house.hub.trust = authority.trust
    return made


def is_signed_by(issuer: Issuer, certificate_der: bytes) -> bool:
    return x509.load_der_x509_certificate(certificate_der).issuer == issuer.certificate.subject


def closed(round_id: str) -> RoundClosed:
    return RoundClosed(message_id=secrets.token_hex(16), round_id=round_id, outcome="dropped", reason="over")


def invited(box: Box) -> None:
    ledger.invite(box.db, make_plan("b" * 64, b"k" * 32), time.time())


def test_a_box_knows_the_next_intermediate_before_it_signs(house: House) -> None:
    box = house.enrol(days_ago=0.0)
    hub_change.follow(box.db, box.data_dir, box.enrolled, time.time())
    made = make_next_intermediate(house, days_ago=0.0)
    assert not is_signed_by(made, house.hub.identity.certificate_der)
    pinned = identity.root_pem(box.enrolled.folder)
    Renewal(box.config, box.enrolled).step(box.db)
    assert box.enrolled.folder.ca.read_bytes() == house.files.authority.pem
    assert identity.root_pem(box.enrolled.folder) == pinned
    in_use = house.files.authority.issue_hub(
        ec.generate_private_key(ec.SECP256R1()).public_key(), days=9, now=time.time() + 8 * DAY_S
    )
    assert is_signed_by(made, in_use.public_bytes(Encoding.DER))
    for trust in (box.enrolled.trust, identity.load(box.data_dir).trust):
        trust.check(in_use.public_bytes(Encoding.DER), expected_name="hub", now=time.time() + 8 * DAY_S)
    # It is the same hub still: a round that is on goes on.
    invited(box)
    hub_change.follow(box.db, box.data_dir, identity.load(box.data_dir), time.time())
    assert box.state_of("round-1") == "invited"
    assert identity.learn_authorities(box.enrolled, box.config.hub) is False


def test_a_box_that_was_away_learns_of_it_and_hears_the_hub(house: House) -> None:
    box = house.enrol(days_ago=0.0)
    made = make_next_intermediate(house, days_ago=30.0)
    assert is_signed_by(made, house.hub.identity.certificate_der)
    house.start_link()
    house.until(house.heard)
    house.hub.say(closed("round-1"))
    house.until(lambda: any("not accepted" in alarm for beat in house.hub.of(Heartbeat) for alarm in beat.alarms))
    assert database.counter(box.db, hub_change.HIGHEST_SEQUENCE) == 0
    Renewal(box.config, box.enrolled).step(box.db)
    house.hub.say(closed("round-1"))
    house.until(lambda: database.counter(box.db, hub_change.HIGHEST_SEQUENCE) > 0)


def test_a_box_renews_from_one_intermediate_to_the_next(house: House) -> None:
    """With a broker and an HTTPS side that were started before the next one was made."""
    box = house.enrol(days_ago=21.0)
    before = box.enrolled.identity.certificate_der
    made = make_next_intermediate(house, days_ago=30.0)
    house.start_link()
    Renewal(box.config, box.enrolled).step(box.db)
    house.until(lambda: box.enrolled.identity.certificate_der != before)
    assert is_signed_by(made, box.enrolled.identity.certificate_der)
    heard = house.heard()
    house.until(lambda: house.heard() >= heard + 2)  # and the hub has opened it
    # The certificate of the new intermediate buys the next one.
    identity.renew(box.enrolled, box.config.hub)
    assert identity.waiting(box.enrolled, time.time()) is not None
    assert house.https.refusals() == []


def test_what_no_root_signed_is_not_learnt(house: House) -> None:
    """Shown by the hub's own HTTPS side: another root, one of its intermediates, and a device's certificate."""
    box = house.enrol(days_ago=0.0)
    before = box.enrolled.folder.ca.read_bytes()
    stranger = make_hub_files(house.folder / "stranger").authority
    device = x509.load_der_x509_certificate(box.enrolled.identity.certificate_der)

    class Shows(Authority):
        @property
        def certificates(self) -> list[x509.Certificate]:
            return [*super().certificates, *stranger.certificates, device]

    house.files.authority.__class__ = Shows
    assert identity.learn_authorities(box.enrolled, box.config.hub) is False
    assert box.enrolled.folder.ca.read_bytes() == before


def test_a_hub_of_before_goes_on_with_its_one_ca(tmp_path: Path) -> None:
    house = House(tmp_path, single_ca=True)
    try:
        box = house.enrol(days_ago=21.0)
        assert box.enrolled.folder.ca.read_bytes() == house.files.authority.pem
        assert box.enrolled.folder.certificate.read_text().count("BEGIN CERTIFICATE") == 1
        before = serial(box.enrolled)
        house.start_link()
        Renewal(box.config, box.enrolled).step(box.db)
        house.until(lambda: serial(box.enrolled) != before)
        heard = house.heard()
        house.until(lambda: house.heard() >= heard + 2)
        house.revoke(serial(box.enrolled))
        paths = house.files.config.paths
        with pytest.raises(SiteError, match="can have no intermediate"):
            setup.new_intermediate(house.files.config, paths.root_key, paths.root_passphrase, now=time.time())
    finally:
        house.close()
