"""Fuzz targets of a round: masked words, shares, what boxes and hub say in each stage, deltas.

Reads bytes; keeps a whole masked round of three boxes in memory, so that messages arrive at every stage.
Never reaches a stage by other means than the boxes' and the hub's own steps.
Source: edge_agent/masking.py, cloud_hub/secure_sum.py, models/delta.py, models/drawn_delta.py, models/addable.py.
"""

from functools import cache

import numpy as np

from cloud_hub import secure_sum
from edge_agent import masking as box
from fleet_link import cohort, masking, messages, shares
from fleet_link.errors import LinkError, TrustError
from models import addable, delta
from models.drawn import Drawn
from models.drawn_delta import DrawnCodec
from models.errors import DeltaError
from tests import masked_support as support
from tests.fuzz.target import Target, target

FIRST, SECOND = "box-01", "box-02"


@target("words")
def _words() -> Target:
    layouts = {
        bits: addable.Layout({"weight": (5, 3)}, b"seed" * 4, 1.0, boxes=3, word_bits=bits, value_bits=8)
        for bits in (16, 32)
    }

    def run(content: bytes) -> None:
        bits: masking.WordBits = 16 if content[:1] == b"\x00" else 32
        words = masking.unpack(content[1:], layouts[bits].word_count, bits)
        mean = addable.decode_sum(words, layouts[bits])
        assert mean["weight"].shape == (5, 3)
        assert np.isfinite(mean["weight"]).all()

    def seed(bits: int) -> bytes:
        change = {"weight": np.linspace(-0.1, 0.1, 15, dtype=np.float32).reshape(5, 3)}
        words, _ = addable.encode(change, layouts[bits], 1.0, np.random.default_rng(1))
        return (b"\x00" if bits == 16 else b"\x01") + words.tobytes()

    return Target("words", run, (seed(16), seed(32)), (TrustError, DeltaError))


@target("share")
def _share() -> Target:
    own, other = (masking.mask_key(bytes([number]) * 16, "round-1") for number in (1, 2))
    route = shares.Route(b"d" * 32, SECOND, FIRST)

    def run(packet: bytes) -> None:
        shares.open(packet, route, own, masking.public_bytes(other))

    pair = shares.SharePair(b"s" * 16, b"m" * 16)
    return Target("share", run, (shares.seal(pair, route, other, masking.public_bytes(own)),), (TrustError,))


@target("share-key")
def _share_key() -> Target:
    """The other side's public key is the stranger's to choose."""
    own = masking.mask_key(b"1" * 16, "round-1")

    def run(public: bytes) -> None:
        shares.seal(shares.SharePair(b"s" * 16, b"m" * 16), shares.Route(b"d" * 32, FIRST, SECOND), own, public)

    return Target("share-key", run, (masking.public_bytes(own),), (TrustError,))


@cache
def _round() -> support.Round:
    """Three boxes, as far as the agreement; its parts are those of boxes that have signed the survivors."""
    of_three = support.Round(support.names_of(3)).keys().shares().upload()
    return of_three.agree()


def _box_seeds() -> tuple[bytes, ...]:
    whole = _round()
    shown = secure_sum.cohort_for(whole.circle, FIRST, message_id=support.ID)
    forwarded = secure_sum.forwarded_for(whole.circle, whole.sharing, whole.made, FIRST, message_id=support.ID)
    agreement = secure_sum.agreement_for(whole.circle, whole.signed, FIRST, message_id=support.ID)
    return tuple(messages.encode(one) for one in (shown, forwarded, whole.told, agreement))


@target("masked-box")
def _masked_box() -> Target:
    """What the hub tells a box, at a box that waits for just this and at one that is further."""
    done = _round().parts[FIRST]
    begun = support.changed(done, roster=None, neighbours={}, sealed={}, held={}, masked_sha256=b"", survivors=None)
    entered = support.changed(done, held={}, masked_sha256=b"", survivors=None)
    masked = support.changed(done, survivors=None)

    def run(body: bytes) -> None:
        message = messages.decode(body)
        if isinstance(message, messages.Cohort):
            for part in (done, begun):
                box.enter(part, message, support.JUDGE, message_id=support.ID)
        elif isinstance(message, messages.SharesForwarded):
            for part in (done, entered):
                box.admit(part, message)
        elif isinstance(message, messages.Survivors):
            for part in (done, masked):
                box.sign_survivors(part, support.identity(FIRST), message, message_id=support.ID)
        elif isinstance(message, messages.Agreement):
            told = box.unmask(done, message, message_id=support.ID)
            assert not set(told.self_shares) & set(told.mask_shares)
        else:
            raise LinkError("the fuzzer's own form")

    return Target("masked-box", run, _box_seeds(), (TrustError, LinkError))


@target("masked-hub")
def _masked_hub() -> Target:
    """What a box tells the hub, as the hub checks it in each stage."""
    whole = _round()

    def run(body: bytes) -> None:
        message = messages.decode(body)
        if isinstance(message, messages.RoundKeys):
            cohort.verify_keys(message.keys, FIRST, support.round_of(whole.plan), support.JUDGE)
        elif isinstance(message, messages.Shares):
            secure_sum.check_shares(whole.circle, FIRST, message)
        elif isinstance(message, messages.SurvivorsSigned):
            secure_sum.check_signature(whole.circle, whole.told, FIRST, message)
        elif isinstance(message, messages.Unmask):
            secure_sum.check_unmask(whole.circle, whole.told, FIRST, message)
            secure_sum.rebuild(whole.circle, whole.told, given | {FIRST: message})
        else:
            raise LinkError("the fuzzer's own form")

    given = whole.unmask()
    keys = messages.RoundKeys(
        message_id=support.ID,
        round_id=whole.plan.round_id,
        plan_digest=support.round_of(whole.plan).plan_digest,
        keys=whole.circle.keys[FIRST],
    )
    said = (keys, whole.made[FIRST], whole.signed[FIRST], given[FIRST])
    return Target("masked-hub", run, tuple(messages.encode(one) for one in said), (TrustError, LinkError))


@target("delta")
def _delta() -> Target:
    shapes = {"head.bias": (3,), "head.weight": (3, 4)}

    def run(payload: bytes) -> None:
        change = delta.decode(payload, shapes)
        assert {name: value.shape for name, value in change.items()} == shapes
        assert all(np.isfinite(value).all() for value in change.values())

    change = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
    return Target("delta", run, (delta.encode(change, 1),), (DeltaError,))


@target("delta-header")
def _delta_header() -> Target:
    """The header alone, with the right length before it."""
    shapes = {"head.bias": (3,), "head.weight": (3, 4)}

    def run(header: bytes) -> None:
        delta.decode(delta.MAGIC + len(header).to_bytes(4, "little") + header + bytes(15), shapes)

    whole = delta.encode({name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}, 1)
    return Target("delta-header", run, (whole[8:-15],), (DeltaError,))


def _drawn_codec() -> DrawnCodec:
    return DrawnCodec(Drawn({"body.weight": (9, 20), "head.bias": (3,)}, b"seed" * 4, 0.1), 3, 1.0)


def _drawn_payload(codec: DrawnCodec) -> bytes:
    ramp = np.linspace(-0.01, 0.01, codec.drawn.size, dtype=np.float32)
    masks = codec.drawn.masks()
    return codec.encode({name: np.where(masks[name], value, 0) for name, value in codec.drawn.cut(ramp).items()}, 1)


def _decode_drawn(codec: DrawnCodec, payload: bytes) -> None:
    change = codec.decode(payload)
    masks = codec.drawn.masks()
    assert {name: value.shape for name, value in change.items()} == codec.drawn.shapes
    assert all(np.isfinite(value).all() and not value[~masks[name]].any() for name, value in change.items())


@target("drawn-delta")
def _drawn_delta() -> Target:
    codec = _drawn_codec()

    def run(payload: bytes) -> None:
        _decode_drawn(codec, payload)

    whole = _drawn_payload(codec)
    return Target("drawn-delta", run, (whole,), (DeltaError,), (whole[:-2], whole + b"\0"))


@target("drawn-delta-code")
def _drawn_delta_code() -> Target:
    """The entropy code alone, after sound steps."""
    codec = _drawn_codec()
    whole = _drawn_payload(codec)
    begin = 12  # magic and the steps of two tensors

    def run(code: bytes) -> None:
        _decode_drawn(codec, whole[:begin] + code)

    return Target("drawn-delta-code", run, (whole[begin:],), (DeltaError,))
