"""Messages: signed by one, for one, at one time, once."""

import itertools
import time

import msgspec
import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet_link import envelope, messages
from fleet_link.errors import LinkError, SiteError, TrustError
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
    opened = open_at_hub(sealed, authority)
    assert (opened.message, opened.sequence) == (MESSAGE, 5)


def test_tells_which_certificate_signed(sealed: bytes, box: Identity, authority: TestAuthority) -> None:
    certificate = x509.load_der_x509_certificate(box.certificate_der)
    assert int(open_at_hub(sealed, authority).serial, 16) == certificate.serial_number


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
    opened = open_at_hub(envelope.seal(box, "hub", message, sequence=sequence, now=NOW), authority)
    assert (opened.message, opened.sequence) == (message, sequence)


# --- replay ---------------------------------------------------------------------------------------

ONE, OTHER = b"1" * 32, b"2" * 32


def test_each_sequence_counts_once() -> None:
    window = envelope.ReplayWindow()
    for sequence in (1, 3, 2, 70):
        window.accept(sequence, ONE)
    for sequence in (1, 2, 3, 70):
        with pytest.raises(envelope.ReplayError):
            window.accept(sequence, OTHER)
    assert window.highest == 70


def test_the_same_message_again_is_a_repeat_and_other_content_is_not() -> None:
    window = envelope.ReplayWindow()
    window.accept(7, ONE)
    with pytest.raises(envelope.RepeatError):
        window.accept(7, ONE)
    with pytest.raises(envelope.ReplayError) as caught:
        window.accept(7, OTHER)
    assert not isinstance(caught.value, envelope.RepeatError)


def test_the_digest_is_of_what_is_signed(box: Identity, authority: TestAuthority) -> None:
    """ECDSA signs the same bytes differently each time: it is the same message all the same."""
    twice = [envelope.seal(box, "hub", MESSAGE, sequence=5, now=NOW) for _ in range(2)]
    other = envelope.seal(box, "hub", MESSAGE, sequence=6, now=NOW)
    assert twice[0] != twice[1]
    first, again, later = (open_at_hub(payload, authority).digest for payload in (*twice, other))
    assert first == again != later


def test_a_late_message_is_taken_whatever_the_gap_until_64_newer_ones_came() -> None:
    window = envelope.ReplayWindow()
    for sequence in range(1000, 64_000, 1000):  # 63 messages, a millisecond apart
        window.accept(sequence, ONE)
    window.accept(1500, ONE)
    window.accept(64_000, ONE)  # the 65th: the oldest is forgotten
    with pytest.raises(envelope.ReplayError, match="1000"):
        window.accept(1000, OTHER)
    window.accept(1001, ONE)


def test_after_a_restart_everything_up_to_the_highest_counts_as_seen() -> None:
    window = envelope.ReplayWindow(highest=500)
    for sequence in (500, 499, 440, 1):
        with pytest.raises(envelope.ReplayError):
            window.accept(sequence, ONE)
    window.accept(502, ONE)
    window.accept(501, ONE)


@given(st.lists(st.integers(1, 200), max_size=300), st.integers(0, 100))
def test_the_window_agrees_with_a_set(sequences: list[int], highest: int) -> None:
    """Nothing is taken twice; what is refused was taken, or 64 above it were."""
    window, taken, top = envelope.ReplayWindow(highest), set(range(highest + 1)), highest
    for sequence in sequences:
        newer = sum(other > sequence for other in taken)
        if sequence not in taken and (newer < 64 or sequence > top):
            window.accept(sequence, ONE)
            taken.add(sequence)
            top = max(top, sequence)
        elif sequence in taken:
            with pytest.raises(envelope.ReplayError):
                window.accept(sequence, OTHER)
    assert window.highest == top


# --- sequence -------------------------------------------------------------------------------------


class Disk:
    """A clock that a test sets, and what survives a restart."""

    def __init__(self) -> None:
        self.now = NOW
        self.reserved = 0
        self.writes = 0

    def sender(self) -> envelope.Sequence:
        return envelope.Sequence(lambda: self.now, self.reserved, self.reserve)

    def reserve(self, highest: int) -> None:
        self.reserved = highest
        self.writes += 1


def test_a_clock_corrected_after_the_start_lifts_the_next_number() -> None:
    """A box without a battery starts in 1970; the hub has seen numbers of today's."""
    disk = Disk()
    seen_before = disk.sender().next()
    replaced = Disk()
    replaced.now = 1000.0
    sequence = replaced.sender()
    assert sequence.next() < seen_before
    replaced.now = NOW + 1
    assert sequence.next() > seen_before


def test_a_clock_set_back_never_lowers_the_next_number() -> None:
    disk = Disk()
    sequence = disk.sender()
    numbers = [sequence.next()]
    disk.now -= 86400
    numbers += [sequence.next() for _ in range(10)]
    assert numbers == sorted(set(numbers))
    restarted = disk.sender()
    assert restarted.next() > numbers[-1]


def test_no_number_is_given_before_the_disk_holds_it_and_the_disk_is_seldom_asked() -> None:
    disk = Disk()
    sequence = disk.sender()
    for _ in range(500):
        assert sequence.next() <= disk.reserved
        disk.now += 0.1
    assert disk.writes == 1
    disk.now += 60
    assert sequence.next() <= disk.reserved
    assert disk.writes == 2


def test_a_number_that_the_disk_refuses_is_not_given() -> None:
    def refuse(highest: int) -> None:
        raise SiteError("no space")

    sequence = envelope.Sequence(lambda: NOW, 0, refuse)
    for _ in range(2):
        with pytest.raises(SiteError):
            sequence.next()
