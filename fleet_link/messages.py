"""What box and hub say to each other: typed, versioned by topic root, limited in size.

Reads and writes bytes (MessagePack); parsing is strict and happens once, in `decode`.
Never carries pixels, patient data or UIDs of images: facts about devices, rounds and releases only.
Source: ARCHITECTURE.md, "The link".
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from fleet_link.errors import LinkError
from fleet_link.pki import MAX_CERTIFICATE_BYTES

MAX_MESSAGE_BYTES = 96 * 1024  # managed brokers cap a packet at 128 KB; room for the envelope
NEIGHBOURS = 32  # at most: whom one box of a masked round shares masks and secrets with
COHORT = 1000  # at most: boxes in one masked round
GROUPS = 32  # at most: in which a masked round is summed apart; the hub holds the mean of each
BASES = 16  # at most: releases that a buffered round takes updates from, its own base first, then newest first

# \Z, not $: Python's $ also accepts a newline at the end.
Name = Annotated[str, Meta(min_length=1, max_length=63, pattern=r"^[a-z0-9][a-z0-9-]*\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
TransferId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Text = Annotated[str, Meta(max_length=500)]
Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="type"):
    """Base: `message_id` lets the receiver's Receipt name it; it is unique per sender."""

    message_id: TransferId


# --- presence -------------------------------------------------------------------------------------


class RoundStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where the box stands in a round; states are those of edge_agent.rounds."""

    round_id: Name
    state: Name
    reason: Text = ""
    staleness: Count = 0  # buffered: releases between what its sealed update was trained from and the base


class Heartbeat(Message, frozen=True, kw_only=True):
    """Facts only. Not durable: the next one replaces it."""

    software_version: Text
    bundle_digest: Digest
    release_version: Count  # 0: the bundle that came with the software
    provider: Text  # the ONNX Runtime execution provider in use
    uptime_s: Count
    series_read: Count
    series_abstained: Count
    series_failed: Count
    quarantined: Count
    reviews: Count
    reviews_agreed: Count
    outbox_pending: Count
    disk_free_bytes: Annotated[int, Meta(ge=0)]
    rounds: Annotated[tuple[RoundStatus, ...], Meta(max_length=16)] = ()
    alarms: Annotated[tuple[Text, ...], Meta(max_length=16)] = ()  # while there is one, no new release is offered
    notices: Annotated[tuple[Text, ...], Meta(max_length=16)] = ()  # somebody should know; new releases may come


# --- rounds ---------------------------------------------------------------------------------------


Rule = Literal["fedavg", "median", "trimmed_mean", "krum", "multi_krum", "centred_clip"]


class RoundPlan(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Hub's invitation. The box checks it against its own site policy and may decline.

    A field that came later is not written while it has its default: the plan's digest stays what older software computes.
    """

    round_id: Name
    kind: Literal["unsafe_open", "masked"]
    base_digest: Digest
    rule: Rule  # masked: fedavg, or another over the means of groups
    trainable: Literal["all", "heads", "norms", "adapters"]  # as models.delta.trainable_names
    clip_norm: Annotated[float, Meta(gt=0.0, le=1e9)]
    epochs: Annotated[int, Meta(ge=1, le=1000)]
    learning_rate: Annotated[float, Meta(gt=0.0, le=1.0)]
    min_examples: Count
    seed: Count
    sealing_key: Annotated[bytes, Meta(min_length=32, max_length=4096)]
    deadline_unix_s: Annotated[float, Meta(ge=0.0, le=1e11)]  # bounds also refuse NaN and infinity
    min_cohort: Count = 0  # masked: so many boxes at least stand in one sum; the box may ask for more
    word_bits: Literal[16, 32] = 32  # masked: the sum is modulo 2^word_bits
    # Of one box's values. Masked: as models.addable has them. Open: 2 to 8, or 16 for models.delta's bytes.
    value_bits: Annotated[int, Meta(ge=2, le=16)] = 16
    boxes_max: Annotated[int, Meta(ge=1, le=COHORT)] = COHORT  # masked: so many boxes at most stand in one sum
    share: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0  # of all weights but heads and norms, those trained
    examples_cap: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 1000  # masked: more examples than these weigh no more
    noise: Annotated[float, Meta(ge=0.0, le=1000.0)] = 0.0  # masked: multiplier, as models.layout has it; 0 is none
    noise_boxes: Annotated[int, Meta(ge=0, le=COHORT)] = 0  # masked: so many honest boxes' noise makes it up
    groups: Annotated[int, Meta(ge=1, le=GROUPS)] = 1  # masked: sums apart; to a box its group is the cohort
    buffer: Annotated[int, Meta(ge=0, le=COHORT)] = 0  # the sum is that of the first so many updates; 0: not buffered
    bases: Annotated[tuple[Digest, ...], Meta(max_length=BASES)] = ()  # buffered: what an update may be trained from


class RoundAnswer(Message, frozen=True, kw_only=True):
    round_id: Name
    joins: bool
    examples: Count
    reason: Text = ""


class RoundClosed(Message, frozen=True, kw_only=True):
    """The round needs nothing more from this box; its spooled update may go."""

    round_id: Name
    outcome: Literal["released", "dropped"]
    reason: Text = ""


# --- masked rounds: the stages in order; edge_agent.masking and cloud_hub.secure_sum say what each must prove --------

Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(max_length=80)]
Names = Annotated[tuple[Name, ...], Meta(max_length=COHORT)]
Packet = Annotated[bytes, Meta(min_length=60, max_length=60)]  # nonce 12, two shares of 16, tag 16


class SignedKeys(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One box's public keys of one round, signed by its device key; round, plan and name are in what it signs."""

    share_key: Bytes32  # X25519: share packets are sealed to it
    mask_key: Bytes32  # X25519: pair masks come from it
    self_commitment: Bytes32  # SHA-256 of the secret behind the box's own mask
    signature: Signature
    certificate: Annotated[bytes, Meta(max_length=MAX_CERTIFICATE_BYTES)]  # DER


class RoundKeys(Message, frozen=True, kw_only=True):
    """Box → hub."""

    round_id: Name
    plan_digest: Bytes32
    keys: SignedKeys


class Cohort(Message, frozen=True, kw_only=True):
    """Hub → box: everyone in the round by name and key digest, and the keys of this box's neighbours."""

    round_id: Name
    names: Names  # sorted
    keys_digests: Annotated[bytes, Meta(max_length=32 * COHORT)]  # 32 bytes for each name, in their order
    neighbours: Annotated[dict[Name, SignedKeys], Meta(max_length=NEIGHBOURS)]


class Shares(Message, frozen=True, kw_only=True):
    """Box → hub: for each neighbour one packet that only it can open."""

    round_id: Name
    cohort_digest: Bytes32
    sealed: Annotated[dict[Name, Packet], Meta(max_length=NEIGHBOURS)]


class SharesForwarded(Message, frozen=True, kw_only=True):
    """Hub → box: the packets its neighbours made for it; their senders are whom it masks against."""

    round_id: Name
    cohort_digest: Bytes32
    sealed: Annotated[dict[Name, Packet], Meta(max_length=NEIGHBOURS)]


class Survivors(Message, frozen=True, kw_only=True):
    """Hub → box: whose masked update is in the sum, and who gave shares but no update. Both sorted."""

    round_id: Name
    cohort_digest: Bytes32
    active: Names
    dropped: Names


class SurvivorsSigned(Message, frozen=True, kw_only=True):
    """Box → hub."""

    round_id: Name
    signature: Signature


class Agreement(Message, frozen=True, kw_only=True):
    """Hub → box: that its neighbours signed the very lists that it signed."""

    round_id: Name
    signatures: Annotated[dict[Name, Signature], Meta(max_length=NEIGHBOURS)]


class Unmask(Message, frozen=True, kw_only=True):
    """Box → hub: of each neighbour exactly one of its two shares."""

    round_id: Name
    self_shares: Annotated[dict[Name, Bytes16], Meta(max_length=NEIGHBOURS)]  # of active neighbours
    mask_shares: Annotated[dict[Name, Bytes16], Meta(max_length=NEIGHBOURS)]  # of dropped ones


# --- releases -------------------------------------------------------------------------------------


class ReleaseOffer(Message, frozen=True, kw_only=True):
    """TUF metadata of a release this device may now take; the bundle follows on BundleRequest."""

    release_version: Count
    bundle_digest: Digest
    bundle_size: Count
    roots: Annotated[tuple[bytes, ...], Meta(max_length=8)]
    timestamp: bytes
    snapshot: bytes
    targets: bytes


class BundleRequest(Message, frozen=True, kw_only=True):
    bundle_digest: Digest


class ReleaseReport(Message, frozen=True, kw_only=True):
    """What became of a release on this box. Held-out reviews: cases never trained on."""

    release_version: Count
    bundle_digest: Digest
    outcome: Literal["activated", "refused", "rolled-back"]
    reason: Text = ""
    heldout: Count = 0
    heldout_correct_before: Count = 0
    heldout_correct_after: Count = 0


# --- transfers ------------------------------------------------------------------------------------


class TransferOffer(Message, frozen=True, kw_only=True):
    """Something large is ready; chunks flow once the receiver has answered with TransferProgress."""

    transfer_id: TransferId
    kind: Literal["update", "bundle"]
    subject: Annotated[str, Meta(max_length=64)]  # round id of an update, digest of a bundle
    sha256: Digest
    size: Annotated[int, Meta(ge=1, le=4 * 1024**3)]
    chunk_bytes: Annotated[int, Meta(ge=1024, le=120 * 1024)]


class TransferProgress(Message, frozen=True, kw_only=True):
    """Receiver → sender: bit i (least significant first) set where chunk i is on the receiver's disk."""

    transfer_id: TransferId
    received_bitmap: Annotated[bytes, Meta(max_length=64 * 1024)]


class TransferReceipt(Message, frozen=True, kw_only=True):
    """The receiver's own word that the whole is on its disk with the right digest, or is refused."""

    transfer_id: TransferId
    accepted: bool
    reason: Text = ""


class Receipt(Message, frozen=True, kw_only=True):
    """Answer to a durable message (RoundAnswer, RoundKeys, Shares, SurvivorsSigned, Unmask, ReleaseReport): it is on the receiver's disk."""

    of: TransferId
    accepted: bool = True
    reason: Text = ""


AnyMessage = (
    Heartbeat
    | RoundPlan
    | RoundAnswer
    | RoundClosed
    | RoundKeys
    | Cohort
    | Shares
    | SharesForwarded
    | Survivors
    | SurvivorsSigned
    | Agreement
    | Unmask
    | ReleaseOffer
    | BundleRequest
    | ReleaseReport
    | TransferOffer
    | TransferProgress
    | TransferReceipt
    | Receipt
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    """Raises LinkError if the message would not fit the wire."""
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE_BYTES:
        raise LinkError(f"{type(message).__name__} of {len(body)} bytes exceeds {MAX_MESSAGE_BYTES}")
    return body


def decode(body: bytes) -> AnyMessage:
    """Raises LinkError on anything that is not exactly one known message."""
    if len(body) > MAX_MESSAGE_BYTES:
        raise LinkError(f"message of {len(body)} bytes exceeds {MAX_MESSAGE_BYTES}")
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LinkError(f"not a message of this fleet: {error}") from error
