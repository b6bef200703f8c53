"""Updates: readable by the hub's key only, bound to plan and sender, signed."""

import os
import stat
import time
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_link import sealing
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import RoundPlan
from fleet_link.pki import Identity
from fleet_link.sealing import SealedUpdate, SealingKey
from tests.fleet_link.mosquitto_support import TestAuthority, twin_certificate

NOW = time.time()
PAYLOAD = b"delta of weights" * 100


@pytest.fixture(scope="module")
def box(authority: TestAuthority) -> Identity:
    return authority.issue("box-1")


@pytest.fixture(scope="module")
def blob(box: Identity, plan: RoundPlan) -> bytes:
    return sealing.seal_update(PAYLOAD, identity=box, plan=plan, examples=24)


@pytest.fixture(scope="module")
def hub(authority: TestAuthority, sealing_key: SealingKey, plan: RoundPlan) -> "Hub":
    return Hub(authority, sealing_key, plan)


class Hub:
    def __init__(self, authority: TestAuthority, key: SealingKey, plan: RoundPlan) -> None:
        self.authority, self.key, self.plan = authority, key, plan

    def open(
        self, blob: bytes, *, sender: str = "box-1", plan: RoundPlan | None = None, key: SealingKey | None = None
    ) -> sealing.OpenedUpdate:
        return sealing.open_update(
            blob,
            private_key=key or self.key,
            trust=self.authority.trust,
            sender=sender,
            plan=plan or self.plan,
            now=NOW,
        )


def resign(blob: bytes, identity: Identity, **changes: bytes) -> bytes:
    """What a device could make of an update: other parts under its own good signature."""
    sealed = msgspec.structs.replace(msgspec.msgpack.decode(blob, type=SealedUpdate), **changes)
    signature = identity.sign(sealing._signed_bytes(sealed.statement, sealed.ciphertext, identity.certificate_der))
    return msgspec.msgpack.encode(
        msgspec.structs.replace(sealed, signature=signature, certificate=identity.certificate_der)
    )


def test_the_hub_reads_what_the_box_sealed(blob: bytes, hub: Hub) -> None:
    opened = hub.open(blob)
    assert opened[:3] == ("box-1", 24, PAYLOAD)


def test_the_hub_learns_which_certificate_signed(blob: bytes, hub: Hub, box: Identity) -> None:
    certificate = x509.load_der_x509_certificate(box.certificate_der)
    assert int(hub.open(blob).serial, 16) == certificate.serial_number


def test_the_payload_is_not_readable_on_the_way(blob: bytes) -> None:
    assert PAYLOAD[:16] not in blob


def test_the_same_plan_sent_again_is_the_same_plan(blob: bytes, hub: Hub, plan: RoundPlan) -> None:
    assert hub.open(blob, plan=msgspec.structs.replace(plan, message_id="f" * 32)).payload == PAYLOAD


@pytest.mark.parametrize(
    "changes", [{"round_id": "round-2"}, {"clip_norm": 2.0}, {"base_digest": "b" * 64}, {"seed": 8}]
)
def test_refuses_an_update_of_another_plan(blob: bytes, hub: Hub, plan: RoundPlan, changes: dict[str, object]) -> None:
    with pytest.raises(TrustError, match="another plan"):
        hub.open(blob, plan=msgspec.structs.replace(plan, **changes))


def test_refuses_another_sender_than_the_topics(blob: bytes, hub: Hub) -> None:
    with pytest.raises(TrustError, match="'box-1', not of 'box-2'"):
        hub.open(blob, sender="box-2")


def test_refuses_an_update_stolen_and_signed_by_another(blob: bytes, hub: Hub, authority: TestAuthority) -> None:
    """box-2 takes box-1's update as its own: the statement names box-1; its own statement does not open the seal."""
    thief = authority.issue("box-2")
    with pytest.raises(TrustError, match="says it is from box-1"):
        hub.open(resign(blob, thief), sender="box-2")
    own = sealing.seal_update(b"", identity=thief, plan=hub.plan, examples=24)
    statement = msgspec.msgpack.decode(own, type=SealedUpdate).statement
    with pytest.raises(TrustError, match="does not open"):
        hub.open(resign(blob, thief, statement=statement), sender="box-2")


def test_refuses_another_count_of_examples_than_was_sealed(blob: bytes, hub: Hub, box: Identity) -> None:
    other = sealing.seal_update(b"", identity=box, plan=hub.plan, examples=1_000_000)
    statement = msgspec.msgpack.decode(other, type=SealedUpdate).statement
    with pytest.raises(TrustError, match="signature"):
        hub.open(
            msgspec.msgpack.encode(
                msgspec.structs.replace(msgspec.msgpack.decode(blob, type=SealedUpdate), statement=statement)
            )
        )
    with pytest.raises(TrustError, match="does not open"):
        hub.open(resign(blob, box, statement=statement))


def test_refuses_a_ciphertext_that_the_broker_put_in(blob: bytes, hub: Hub) -> None:
    """The hub's key is public, so anyone can seal under box-1's own statement; only box-1 can sign it."""
    sealed = msgspec.msgpack.decode(blob, type=SealedUpdate)
    public = sealing._load_public(hub.plan.sealing_key)
    poison = sealing._suite.encrypt(b"poison", public, info=sealing.DOMAIN + sealed.statement)
    with pytest.raises(TrustError, match="signature of the update"):
        hub.open(msgspec.msgpack.encode(msgspec.structs.replace(sealed, ciphertext=poison)))


def test_refuses_the_other_form_of_the_authoritys_signature(blob: bytes, hub: Hub) -> None:
    sealed = msgspec.msgpack.decode(blob, type=SealedUpdate)
    twin = twin_certificate(sealed.certificate)
    with pytest.raises(TrustError, match="signature of the update"):
        hub.open(msgspec.msgpack.encode(msgspec.structs.replace(sealed, certificate=twin)))


def test_refuses_what_is_sealed_to_another_key(blob: bytes, hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="does not open") as refused:
        hub.open(blob, key=sealing.new_sealing_key(tmp_path / "other.key"))
    assert "sealing key changed" in refused.value.advice


def test_refuses_an_expired_sender(hub: Hub, authority: TestAuthority) -> None:
    expired = authority.issue("box-1", to_days=-0.1)
    with pytest.raises(TrustError, match="not valid"):
        hub.open(sealing.seal_update(PAYLOAD, identity=expired, plan=hub.plan, examples=1))


def test_refuses_every_cut_and_a_flip_in_every_byte(box: Identity, hub: Hub) -> None:
    blob = bytearray(sealing.seal_update(b"small", identity=box, plan=hub.plan, examples=1))
    for position in range(len(blob)):
        with pytest.raises(TrustError):
            hub.open(bytes(blob[:position]))
        blob[position] ^= 1 << position % 8
        with pytest.raises(TrustError):
            hub.open(bytes(blob))
        blob[position] ^= 1 << position % 8
    with pytest.raises(TrustError):
        hub.open(bytes(blob) + b"\x00")


def test_refuses_another_version(blob: bytes, hub: Hub) -> None:
    newer = msgspec.structs.replace(msgspec.msgpack.decode(blob, type=SealedUpdate), v=2)
    with pytest.raises(TrustError, match="version 2"):
        hub.open(msgspec.msgpack.encode(newer))


@pytest.mark.parametrize("public", [b"x" * 32, b"x" * 1215, b"\xff" * 1216, b"x" * 1217])
def test_a_plan_with_no_real_key_is_declined(box: Identity, plan: RoundPlan, public: bytes) -> None:
    with pytest.raises(LinkError, match="sealing key"):
        sealing.seal_update(PAYLOAD, identity=box, plan=msgspec.structs.replace(plan, sealing_key=public), examples=1)


@given(junk=st.binary(max_size=2000))
@settings(max_examples=50, deadline=None)
def test_random_bytes_are_refused(junk: bytes, hub: Hub, blob: bytes, box: Identity) -> None:
    for payload in (junk, resign(blob, box, ciphertext=junk), resign(blob, box, statement=junk)):
        with pytest.raises(TrustError):
            hub.open(payload)


@given(payload=st.binary(max_size=5000), examples=st.integers(0, 1_000_000_000))
@settings(max_examples=30, deadline=None)
def test_what_is_sealed_opens_unchanged(payload: bytes, examples: int, hub: Hub, box: Identity) -> None:
    blob = sealing.seal_update(payload, identity=box, plan=hub.plan, examples=examples)
    assert hub.open(blob)[:3] == ("box-1", examples, payload)


def test_an_update_of_some_megabytes(box: Identity, hub: Hub) -> None:
    payload = os.urandom(4 * 1024**2)
    assert hub.open(sealing.seal_update(payload, identity=box, plan=hub.plan, examples=1)).payload == payload


def test_the_key_survives_on_disk_and_is_private(tmp_path: Path, box: Identity, hub: Hub) -> None:
    path = tmp_path / "sealing.key"
    key = sealing.new_sealing_key(path)
    loaded = sealing.load_sealing_key(path)
    assert sealing.public_bytes(loaded) == sealing.public_bytes(key)
    assert len(sealing.public_bytes(key)) == 1184 + 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    plan = msgspec.structs.replace(hub.plan, sealing_key=sealing.public_bytes(key))
    blob = sealing.seal_update(PAYLOAD, identity=box, plan=plan, examples=1)
    assert hub.open(blob, plan=plan, key=loaded).payload == PAYLOAD
    with pytest.raises(SiteError, match="exists"):
        sealing.new_sealing_key(path)


@pytest.mark.parametrize("length", [0, 64, 95, 97])
def test_a_damaged_key_file_is_the_sites_matter(tmp_path: Path, length: int) -> None:
    path = tmp_path / "sealing.key"
    path.write_bytes(b"x" * length)
    with pytest.raises(SiteError, match="cannot be read") as refused:
        sealing.load_sealing_key(path)
    assert "backup" in refused.value.advice
    with pytest.raises(SiteError):
        sealing.load_sealing_key(tmp_path / "missing.key")
