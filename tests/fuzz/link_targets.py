"""Fuzz targets of fleet_link: messages, envelopes, sealed updates, chunks, topics, tokens, certificates.

Reads bytes; writes the parts of a transfer in a temporary folder.
Never stops at a signature where an enrolled device could have made it: `…-insider` signs what the fuzzer made.
Source: what a broker, a device or the hub may send; keys and signatures are new in each process.
"""

import hashlib
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding

from fleet_link import chunks, envelope, messages, pki, sealing, tokens, topics
from fleet_link.errors import LinkError, SiteError, TrustError
from fleet_link.messages import TransferOffer, TransferProgress
from tests.fleet_link.mosquitto_support import TestAuthority
from tests.fuzz import samples
from tests.fuzz.target import Target, target

BOX = "box-01"


@cache
def authority() -> TestAuthority:
    return TestAuthority()


@cache
def identity() -> pki.Identity:
    return authority().issue(BOX)


def now() -> float:
    return authority().certificate.not_valid_before_utc.timestamp() + 400 * 86_400


@target("messages")
def _messages() -> Target:
    def run(body: bytes) -> None:
        message = messages.decode(body)
        with suppress(LinkError):  # defaults written out may no longer fit
            assert messages.decode(messages.encode(message)) == message

    return Target("messages", run, tuple(messages.encode(one) for one in samples.every_message()), (LinkError,))


@target("envelope")
def _envelope() -> Target:
    def run(payload: bytes) -> None:
        envelope.open(payload, authority().trust, sender=BOX, recipient="hub", now=now())

    seeds = (
        envelope.seal(identity(), "hub", one, sequence=number + 1, now=now())
        for number, one in enumerate(samples.every_message())
    )
    return Target("envelope", run, tuple(seeds), (TrustError, LinkError))


@target("envelope-insider")
def _envelope_insider() -> Target:
    def run(statement: bytes) -> None:
        certificate = identity().certificate_der
        signed = b"".join((envelope.DOMAIN, hashlib.sha256(certificate).digest(), statement))
        outer = {
            "v": 1,
            "statement": statement,
            "signature": identity().sign(signed),
            "certificate": certificate,
        }
        opened = envelope.open(msgspec.msgpack.encode(outer), authority().trust, sender=BOX, recipient="hub", now=now())
        with suppress(envelope.ReplayError):
            envelope.ReplayWindow(5).accept(opened.sequence, opened.digest)

    def statement(number: int, one: messages.AnyMessage) -> bytes:
        sealed = envelope.seal(identity(), "hub", one, sequence=number + 1, now=now())
        return bytes(msgspec.msgpack.decode(sealed)["statement"])

    seeds = tuple(statement(number, one) for number, one in enumerate(samples.every_message()))
    return Target("envelope-insider", run, seeds, (TrustError, LinkError))


@cache
def sealing_key() -> sealing.SealingKey:
    with tempfile.TemporaryDirectory() as folder:
        return sealing.new_sealing_key(Path(folder) / "sealing.key")


@cache
def plan() -> messages.RoundPlan:
    return samples.plan(sealing.public_bytes(sealing_key()))


def _open_update(blob: bytes) -> None:
    sealing.open_update(blob, private_key=sealing_key(), trust=authority().trust, sender=BOX, plan=plan(), now=now())


def _sealed() -> bytes:
    return sealing.seal_update(b"a delta", identity=identity(), plan=plan(), examples=5)


@target("update")
def _update() -> Target:
    return Target("update", _open_update, (_sealed(),), (TrustError,))


@target("update-insider")
def _update_insider() -> Target:
    """An enrolled device signs any statement and ciphertext."""

    def run(content: bytes) -> None:
        try:
            statement, ciphertext = msgspec.msgpack.decode(content, type=tuple[bytes, bytes])
        except msgspec.DecodeError as error:
            raise TrustError("the fuzzer's own form") from error
        certificate = identity().certificate_der
        digests = (hashlib.sha256(part).digest() for part in (statement, ciphertext, certificate))
        outer = {
            "v": 1,
            "statement": statement,
            "ciphertext": ciphertext,
            "signature": identity().sign(sealing.DOMAIN + b"".join(digests)),
            "certificate": certificate,
        }
        _open_update(msgspec.msgpack.encode(outer))

    outer = msgspec.msgpack.decode(_sealed())
    seed = msgspec.msgpack.encode((outer["statement"], outer["ciphertext"]))
    return Target("update-insider", run, (seed,), (TrustError,))


def _offer(content: bytes) -> TransferOffer:
    return TransferOffer(
        message_id="0" * 32,
        transfer_id="1" * 32,
        kind="update",
        subject="round-1",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        chunk_bytes=1024,
    )


@target("chunk")
def _chunk() -> Target:
    content = bytes(range(256)) * 10
    offer, folder = _offer(content), tempfile.TemporaryDirectory()
    incoming = chunks.Incoming.open(Path(folder.name), offer, max_bytes=4096)

    def run(frame: bytes) -> None:
        assert folder
        incoming.on_chunk(frame)
        if incoming.complete:
            incoming.finish().unlink()
            incoming.__init__(chunks.PartFile.open(Path(folder.name), offer))  # type: ignore[misc]

    seeds = tuple(
        chunks.frame(offer.transfer_id, index, content[index * 1024 : (index + 1) * 1024]) for index in range(3)
    )
    return Target("chunk", run, seeds, (LinkError, TrustError))


@target("progress")
def _progress() -> Target:
    content = b"c" * 20_000
    offer, folder = _offer(content), tempfile.TemporaryDirectory()
    path = Path(folder.name) / "update"
    path.write_bytes(content)
    outgoing = chunks.Outgoing(path, offer)

    def run(bitmap: bytes) -> None:
        assert folder
        outgoing.on_progress(
            TransferProgress(message_id="0" * 32, transfer_id=offer.transfer_id, received_bitmap=bitmap), 1.0
        )
        sent = [index for index, _ in outgoing.due(1.0)]
        assert all(0 <= index < 20 for index in sent)

    return Target("progress", run, (b"", b"\x00\x00\x00", b"\xff\xff\x0f", b"\x05\x00\x01"), (LinkError,))


@target("offer")
def _offered() -> Target:
    """Any offer that is a message: whether it is refused or opened, in a folder of its own."""

    def run(body: bytes) -> None:
        offer = messages.decode(body)
        if not isinstance(offer, TransferOffer):
            raise LinkError("the fuzzer's own form")
        with tempfile.TemporaryDirectory() as folder:
            incoming = chunks.Incoming.open(Path(folder), offer, max_bytes=64 * 1024)
            incoming.on_chunk(chunks.frame(offer.transfer_id, 0, b"c" * min(offer.size, offer.chunk_bytes)))
            if incoming.complete:
                with suppress(TrustError):  # the digest
                    incoming.finish()
            incoming.drop()

    return Target("offer", run, (messages.encode(_offer(b"c" * 3000)),), (LinkError, SiteError))


@target("topic")
def _topic() -> Target:
    def run(content: bytes) -> None:
        text = content.decode(errors="surrogateescape")
        assert str(topics.parse(text)) == text

    return Target("topic", run, (b"wr1/up/box-01/msg", b"wr1/down/box-01/chunk"), (LinkError,))


@target("token")
def _token() -> Target:
    def run(content: bytes) -> None:
        text = content.decode(errors="surrogateescape")
        assert tokens.parse(text).text() == text.strip()

    token = tokens.EnrolmentToken(BOX, "https://hub.example:8443", "a" * 64, "s" * 32)
    return Target("token", run, (token.text().encode(),), (LinkError,))


@target("token-inside")
def _token_inside() -> Target:
    """The JSON within the base64."""

    def run(content: bytes) -> None:
        encoded = tokens.base64.urlsafe_b64encode(content).rstrip(b"=").decode()
        tokens.parse(tokens.PREFIX + encoded)

    token = tokens.EnrolmentToken(BOX, "https://hub.example:8443", "a" * 64, "s" * 32)
    return Target("token-inside", run, (msgspec.json.encode(token),), (LinkError,))


@target("certificate")
def _certificate() -> Target:
    def run(der: bytes) -> None:
        certificate = pki.parse_certificate(der)
        pki.serial_hex(certificate)
        pki.common_name(certificate.subject)
        authority().trust.check(der, expected_name=BOX, now=now())

    return Target("certificate", run, (identity().certificate_der,), (TrustError,))


@target("pinned-ca")
def _pinned_ca() -> Target:
    def run(pem: bytes) -> None:
        pki.Trust(pem).check(identity().certificate_der, expected_name=BOX, now=now())

    return Target("pinned-ca", run, (authority().pem,), (TrustError,))


@target("csr")
def _csr() -> Target:
    from cryptography import x509

    pem = pki.build_csr(identity().private_key, BOX)
    return Target("csr", pki.read_csr, (pem, x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER)), (TrustError,))
