"""Messages: signed by one, for one, at one time, once."""

import itertools
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_link import envelope, messages
from fleet_link.errors import LinkError, TrustError
from fleet_link.messages import BundleRequest, Receipt
from fleet_link.pki import Identity
from tests.fleet_link.mosquitto_support import TestAuthority, twin_certificate

NOW = time.time()
MESSAGE = Receipt(message_id="1" * 32, of="2" * 32)


@pytest.fixture(scope="module")
def box(authority: TestAuthority) -> Identity:
    return authority.issue("box-1")


@pytest.fixture(scope="module")
def sealed(box: Identity) -> bytes:
    return envelope.seal(box, "hub", MESSAGE, sequence=5, now=NOW)


def open_at_hub(payload: bytes, authority: TestAuthority, sender: str = "box-1", now: float = NOW) -> envelope.Opened:
    return envelope.open(payload, authority.trust, sender=sender, recipient="hub", now=now)


def test_gives_message_and_sequence(sealed: bytes, authority: TestAuthority) -> None:
    assert open_at_hub(sealed, authority) == (MESSAGE, 5)


def test_refuses_another_sender_than_the_topics(sealed: bytes, authority: TestAuthority) -> None:
    with pytest.raises(TrustError, match="'box-1', not of 'box-2'"):
        open_at_hub(sealed, authority, sender="box-2")


def test_refuses_a_swapped_sender(box: Identity, authority: TestAuthority) -> None:
    """box-1 signs in the name of box-2: with its own certificate, or with box-2's."""
    other = authority.issue("box-2")
    for certificate in (box.certificate_der, other.certificate_der):
        forger = Identity("box-2", box.private_key, certificate)
        with pytest.raises(TrustError):
            open_at_hub(envelope.seal(forger, "hub", MESSAGE, sequence=1, now=NOW), authority, sender="box-2")


def test_refuses_a_statement_of_another_sender_under_a_good_signature(box: Identity, authority: TestAuthority) -> None:
    liar = Identity("box-2", box.private_key, box.certificate_der)
    with pytest.raises(TrustError, match="says it is from box-2"):
        open_at_hub(envelope.seal(liar, "hub", MESSAGE, sequence=1, now=NOW), authority)


def test_refuses_what_is_for_another(box: Identity, authority: TestAuthority) -> None:
    with pytest.raises(TrustError, match="is for box-2"):
        open_at_hub(envelope.seal(box, "box-2", MESSAGE, sequence=1, now=NOW), authority)


@pytest.mark.parametrize(("offset_s", "side"), [(901.0, "behind"), (-901.0, "ahead of")])
def test_refuses_a_clock_too_far_off_and_says_so(
    sealed: bytes, authority: TestAuthority, offset_s: float, side: str
) -> None:
    with pytest.raises(TrustError, match=side) as refused:
        open_at_hub(sealed, authority, now=NOW + offset_s)
    assert "timedatectl" in refused.value.advice
    open_at_hub(sealed, authority, now=NOW + offset_s * 0.99)


def test_refuses_an_expired_sender(authority: TestAuthority) -> None:
    expired = authority.issue("box-1", to_days=-0.1)
    with pytest.raises(TrustError, match="not valid"):
        open_at_hub(envelope.seal(expired, "hub", MESSAGE, sequence=1, now=NOW), authority)


def test_refuses_every_flipped_bit(sealed: bytes, authority: TestAuthority) -> None:
    for position, bit in itertools.product(range(len(sealed)), range(8)):
        changed = bytearray(sealed)
        changed[position] ^= 1 << bit
        with pytest.raises(TrustError):
            open_at_hub(bytes(changed), authority)


def test_refuses_the_other_form_of_the_authoritys_signature(
    box: Identity, sealed: bytes, authority: TestAuthority
) -> None:
    """(r, n - s) is as valid a signature of the CA as (r, s), and anyone can compute it."""
    twin = twin_certificate(box.certificate_der)
    authority.trust.check(twin, expected_name="box-1", now=NOW)  # X.509 alone cannot tell
    one = msgspec.msgpack.decode(sealed, type=envelope.Envelope)
    with pytest.raises(TrustError, match="signature of a message"):
        open_at_hub(msgspec.msgpack.encode(msgspec.structs.replace(one, certificate=twin)), authority)


def test_refuses_every_cut_and_anything_appended(sealed: bytes, authority: TestAuthority) -> None:
    for length in range(len(sealed)):
        with pytest.raises(TrustError):
            open_at_hub(sealed[:length], authority)
    with pytest.raises(TrustError):
        open_at_hub(sealed + b"\x00", authority)


def test_refuses_parts_of_two_envelopes_put_together(box: Identity, sealed: bytes, authority: TestAuthority) -> None:
    one = msgspec.msgpack.decode(sealed, type=envelope.Envelope)
    two = msgspec.msgpack.decode(envelope.seal(box, "hub", MESSAGE, sequence=6, now=NOW), type=envelope.Envelope)
    mixed = msgspec.msgpack.encode(msgspec.structs.replace(one, statement=two.statement))
    with pytest.raises(TrustError, match="signature"):
        open_at_hub(mixed, authority)


def test_refuses_a_signature_made_for_another_purpose(box: Identity, sealed: bytes, authority: TestAuthority) -> None:
    one = msgspec.msgpack.decode(sealed, type=envelope.Envelope)
    signed = envelope._signed_bytes(one.statement, one.certificate)
    undomained = msgspec.structs.replace(one, signature=box.sign(signed.removeprefix(envelope.DOMAIN)))
    with pytest.raises(TrustError, match="signature"):
        open_at_hub(msgspec.msgpack.encode(undomained), authority)


def test_refuses_another_version(sealed: bytes, authority: TestAuthority) -> None:
    newer = msgspec.structs.replace(msgspec.msgpack.decode(sealed, type=envelope.Envelope), v=2)
    with pytest.raises(TrustError, match="version 2"):
        open_at_hub(msgspec.msgpack.encode(newer), authority)


def test_an_authentic_message_of_an_unknown_kind_is_no_attack(
    box: Identity, authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer peer may say what this one does not know: refused, but without alarm."""
    monkeypatch.setattr(messages, "encode", lambda message: msgspec.msgpack.encode({"type": "News"}))
    payload = envelope.seal(box, "hub", MESSAGE, sequence=1, now=NOW)
    with pytest.raises(LinkError, match="not a message"):
        open_at_hub(payload, authority)


def test_the_largest_message_fits_the_wire(box: Identity, authority: TestAuthority) -> None:
    big = messages.ReleaseOffer(
        message_id="1" * 32,
        release_version=1,
        bundle_digest="a" * 64,
        bundle_size=1,
        roots=(),
        timestamp=b"",
        snapshot=b"",
        targets=b"x" * (messages.MAX_MESSAGE_BYTES - 300),
    )
    payload = envelope.seal(box, "hub", big, sequence=1, now=NOW)
    assert open_at_hub(payload, authority).message == big
    with pytest.raises(LinkError, match="exceeds"):
        envelope.seal(
            box, "hub", msgspec.structs.replace(big, targets=b"x" * messages.MAX_MESSAGE_BYTES), sequence=1, now=NOW
        )
    with pytest.raises(TrustError, match="exceeds"):
        open_at_hub(b"x" * (envelope.MAX_ENVELOPE_BYTES + 1), authority)


@given(junk=st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes_are_refused(junk: bytes, authority: TestAuthority) -> None:
    with pytest.raises(TrustError):
        open_at_hub(junk, authority)
    with pytest.raises(LinkError):
        messages.decode(junk)


@given(junk=st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_a_device_gone_mad_is_refused(junk: bytes, authority: TestAuthority, box: Identity) -> None:
    """A good signature over anything at all."""
    payload = msgspec.msgpack.encode(
        envelope.Envelope(
            v=1,
            statement=junk,
            signature=box.sign(envelope._signed_bytes(junk, box.certificate_der)),
            certificate=box.certificate_der,
        )
    )
    with pytest.raises((TrustError, LinkError)):
        open_at_hub(payload, authority)


@given(
    sequence=st.integers(1, 2**62 - 1),
    digest=st.text("0123456789abcdef", min_size=64, max_size=64),
)
@settings(max_examples=50, deadline=None)
def test_what_is_sealed_opens_unchanged(sequence: int, digest: str, authority: TestAuthority, box: Identity) -> None:
    message = BundleRequest(message_id="3" * 32, bundle_digest=digest)
    assert open_at_hub(envelope.seal(box, "hub", message, sequence=sequence, now=NOW), authority) == (message, sequence)


# --- replay ---------------------------------------------------------------------------------------


def test_each_sequence_counts_once() -> None:
    window = envelope.ReplayWindow()
    for sequence in (1, 3, 2, 70):
        window.accept(sequence)
    for sequence in (1, 2, 3, 70):
        with pytest.raises(envelope.ReplayError):
            window.accept(sequence)
    assert window.highest == 70


def test_late_by_less_than_64_is_accepted_and_older_is_not() -> None:
    window = envelope.ReplayWindow()
    window.accept(1000)
    window.accept(937)
    with pytest.raises(envelope.ReplayError, match="936"):
        window.accept(936)


def test_after_a_restart_everything_up_to_the_highest_counts_as_seen() -> None:
    window = envelope.ReplayWindow(highest=500)
    for sequence in (500, 499, 440, 1):
        with pytest.raises(envelope.ReplayError):
            window.accept(sequence)
    window.accept(502)
    window.accept(501)


@given(st.lists(st.integers(1, 200), max_size=300), st.integers(0, 100))
def test_the_window_agrees_with_a_set(sequences: list[int], highest: int) -> None:
    window, seen, top = envelope.ReplayWindow(highest), set(range(highest + 1)), highest
    for sequence in sequences:
        expected = sequence not in seen and sequence > top - 64
        if expected:
            window.accept(sequence)
        else:
            with pytest.raises(envelope.ReplayError):
                window.accept(sequence)
        seen.add(sequence)
        top = max(top, sequence)
    assert window.highest == top


def test_a_restarted_sender_goes_on_above_what_it_sent() -> None:
    before = envelope.Sequence.from_clock(NOW)
    last = [before.next() for _ in range(1000)][-1]
    assert envelope.Sequence.from_clock(NOW + 1).next() > last
