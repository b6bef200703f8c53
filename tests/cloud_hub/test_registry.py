"""Sites, devices, tokens, and what the broker is told of them."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509

from cloud_hub import database, registry
from cloud_hub.database import Certificate, Refusal, Token, record_refusal
from cloud_hub.registry import NotFoundError
from fleet_link import pki, tokens
from fleet_link.errors import SiteError, TrustError
from tests.cloud_hub.hub_support import HubFiles, make_hub_files

NOW = time.time()


@pytest.fixture
def hub(tmp_path: Path) -> HubFiles:
    return make_hub_files(tmp_path)


def _token(hub: HubFiles, device: str, now: float = NOW) -> tokens.EnrolmentToken:
    with hub.database.writing() as session:
        return registry.new_token(session, device, config=hub.config, authority=hub.authority, now=now)


def test_a_token_tells_the_box_where_whom_and_what_to_trust(hub: HubFiles) -> None:
    hub.add_device("box-a")
    token = tokens.parse(_token(hub, "box-a").text())
    assert (token.device, token.hub_url, token.ca_sha256) == ("box-a", hub.config.url, hub.authority.sha256)


def test_the_secret_itself_is_not_kept(hub: HubFiles) -> None:
    hub.add_device("box-a")
    token = _token(hub, "box-a")
    hub.database.close()
    kept = b"".join(path.read_bytes() for path in hub.config.paths.data_dir.glob("hub.db*"))
    assert registry.secret_sha256(token.secret).encode() in kept
    assert token.secret.encode() not in kept


def test_a_new_token_ends_the_one_before(hub: HubFiles) -> None:
    hub.add_device("box-a")
    first, second = _token(hub, "box-a"), _token(hub, "box-a", NOW + 1)
    with hub.database.reading() as session:
        assert session.get_one(Token, registry.secret_sha256(first.secret)).expires_at == NOW + 1
        assert session.get_one(Token, registry.secret_sha256(second.secret)).expires_at > NOW + 86400


@pytest.mark.parametrize("name", ["", "Box", "a/b", "+", "#", "a b", "hub", "-a", "a" * 64, "ä"])
def test_names_that_cannot_be_a_topic_are_refused(hub: HubFiles, name: str) -> None:
    hub.add_device("box-a", "north")
    with hub.database.writing() as session:
        with pytest.raises(SiteError, match="cannot be the name"):
            registry.add_site(session, name, now=NOW)
        with pytest.raises(SiteError, match="cannot be the name"):
            registry.add_device(session, name, "north", now=NOW)


def test_twice_and_nowhere_are_refused_with_advice(hub: HubFiles) -> None:
    hub.add_device("box-a", "north")
    with hub.database.writing() as session:
        with pytest.raises(SiteError, match="exists already"):
            registry.add_site(session, "north", now=NOW)
        with pytest.raises(SiteError, match="exists already") as caught:
            registry.add_device(session, "box-a", "north", now=NOW)
        assert caught.value.advice.endswith("fleet device token box-a")
        with pytest.raises(NotFoundError, match="no site south"):
            registry.add_device(session, "box-b", "south", now=NOW)
        with pytest.raises(NotFoundError):
            registry.new_token(session, "box-b", config=hub.config, authority=hub.authority, now=NOW)


def test_revoking_voids_certificates_tokens_and_access_and_twice_is_once(hub: HubFiles, tmp_path: Path) -> None:
    hub.add_device("box-a")
    hub.add_device("box-b")
    certificate = x509.load_pem_x509_certificate(hub.device_files(tmp_path, "box-a")[0].read_bytes())
    token = _token(hub, "box-a")
    hub.write_access()
    assert "user box-a\n" in (hub.config.paths.broker / "acl").read_text()
    for now in (NOW + 10, NOW + 20):
        with hub.database.writing() as session:
            registry.revoke(session, "box-a", now=now)
    registry.write_access(hub.database, hub.authority, hub.config, now=NOW + 20)
    acl = (hub.config.paths.broker / "acl").read_text()
    assert "box-a" not in acl
    assert "user box-b\n" in acl
    crl = x509.load_pem_x509_crl(hub.config.paths.crl.read_bytes())
    assert [entry.serial_number for entry in crl] == [certificate.serial_number]
    with hub.database.reading() as session:
        assert session.get_one(database.Device, "box-a").revoked_at == NOW + 10
        assert session.get_one(Token, registry.secret_sha256(token.secret)).expires_at == NOW + 10
        assert not registry.is_active(session, "box-a")
        assert registry.is_active(session, "box-b")
        assert not registry.is_active(session, "stranger")
    with pytest.raises(SiteError, match="is revoked"):
        _token(hub, "box-a")


def test_the_acl_gives_each_its_own_topics() -> None:
    assert registry.acl_text(["box-a"]) == (
        "user hub\n"
        "topic read wr1/up/+/msg\ntopic read wr1/up/+/chunk\n"
        "topic write wr1/down/+/msg\ntopic write wr1/down/+/chunk\n"
        "\nuser box-a\n"
        "topic read wr1/down/box-a/msg\ntopic read wr1/down/box-a/chunk\n"
        "topic write wr1/up/box-a/msg\ntopic write wr1/up/box-a/chunk\n"
    )


def test_a_certificate_counts_for_its_own_device_until_it_is_revoked(hub: HubFiles, tmp_path: Path) -> None:
    hub.add_device("box-a")
    hub.add_device("box-b")
    serial = pki.serial_hex(x509.load_pem_x509_certificate(hub.device_files(tmp_path, "box-a")[0].read_bytes()))
    with hub.database.writing() as session:
        registry.check_certificate(session, "box-a", serial)
        for device, other in (("box-b", serial), ("box-a", "ff")):
            with pytest.raises(TrustError, match="has no certificate") as caught:
                registry.check_certificate(session, device, other)
            assert f"fleet device token {device}" in caught.value.advice
        session.get_one(Certificate, serial).revoked_at = NOW
        session.flush()
        with pytest.raises(TrustError, match="revoked or replaced"):
            registry.check_certificate(session, "box-a", serial)


@pytest.mark.parametrize(
    ("days", "words"), [(None, ""), (2.5, ""), (1.5, "ends in 36 hours"), (0.5, "ends in 12 hours"), (-1, "has ended")]
)
def test_the_operator_is_told_of_a_certificate_that_ends_soon(days: float | None, words: str) -> None:
    alarm = registry.certificate_alarm(None if days is None else NOW + days * 86400, now=NOW)
    assert words in alarm
    assert bool(alarm) == bool(words)


def test_the_database_is_ours_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        opened = database.connect(tmp_path / "hub.db")
        with opened.writing() as session:
            registry.add_site(session, "north", now=NOW)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert modes == {"hub.db": 0o600, "hub.db-wal": 0o600, "hub.db-shm": 0o600}
        opened.close()
    finally:
        os.umask(before)


def test_a_database_of_an_older_hub_is_closed_to_others(tmp_path: Path) -> None:
    database.connect(tmp_path / "hub.db").close()
    (tmp_path / "hub.db").chmod(0o644)
    database.connect(tmp_path / "hub.db").close()
    assert (tmp_path / "hub.db").stat().st_mode & 0o777 == 0o600


def test_a_database_in_a_folder_that_is_not_there_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="No such file") as caught:
        database.connect(tmp_path / "gone" / "hub.db")
    assert caught.value.advice


def test_the_same_refusal_again_is_counted_and_old_ones_go(hub: HubFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "REFUSALS_KEPT", 3)
    with hub.database.writing() as session:
        record_refusal(session, device="x", what="message", reason="replay", now=1.0)
        record_refusal(session, device="x", what="message", reason="replay", now=2.0)
        row = session.query(Refusal).one()
        assert (row.count, row.at) == (2, 2.0)
        for number in range(5):
            record_refusal(session, device="x", what="message", reason=f"{number}" * 1000, now=3.0)
        assert [row.reason[0] for row in session.query(Refusal)] == ["2", "3", "4"]
        assert {len(row.reason) for row in session.query(Refusal)} == {500}


def test_a_failed_transaction_leaves_nothing(hub: HubFiles) -> None:
    with pytest.raises(ZeroDivisionError), hub.database.writing() as session:  # noqa: PT012
        registry.add_site(session, "north", now=NOW)
        raise ZeroDivisionError
    with hub.database.reading() as session:
        assert session.get(database.Site, "north") is None


def test_reading_does_not_wait_for_a_writer_and_sees_the_last_commit(hub: HubFiles) -> None:
    with hub.database.writing() as writer:
        registry.add_site(writer, "north", now=NOW)
        with hub.database.reading() as reader:
            assert reader.get(database.Site, "north") is None
    with hub.database.reading() as reader:
        assert reader.get(database.Site, "north") is not None


def test_writers_wait_for_each_other_and_lose_nothing(hub: HubFiles) -> None:
    def add(worker: int) -> None:
        for number in range(10):
            with hub.database.writing() as session:
                count = session.query(database.Site).count()  # read, then write: the second must see the first's row
                registry.add_site(session, f"s{count}", now=NOW + worker + number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    with hub.database.reading() as session:
        assert session.query(database.Site).count() == 40


def test_a_database_of_a_newer_software_is_refused(hub: HubFiles) -> None:
    with hub.database.writing() as session:
        session.connection().exec_driver_sql("PRAGMA user_version=99")
    with pytest.raises(SiteError, match="schema 99"):
        database.connect(hub.config.paths.database)
