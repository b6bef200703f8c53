"""The box's side of a masked round, step by step: keys, shares, masked update, survivors, unmasking.

Reads messages of the hub and a Part in memory; gives the next Part, which the caller keeps on disk before it sends anything.
Never does I/O, reads a clock or draws the box's secrets (share polynomials and nonces: fleet_link.shares); never takes back a step.
Source: Bonawitz et al. 2017; Bell et al. 2020 (SecAgg+); the hub's end is cloud_hub/secure_sum.py.
"""

import hashlib
import os
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from fleet_link import cohort, masking, shares
from fleet_link.cohort import Judge, Place, PublicKeys, Roster, RoundOf
from fleet_link.errors import PeerError, SiteError, TooFewError, TrustError
from fleet_link.masking import WordBits
from fleet_link.messages import (
    Agreement,
    Bytes16,
    Bytes32,
    Cohort,
    Name,
    Packet,
    RoundKeys,
    RoundPlan,
    Shares,
    SharesForwarded,
    SignedKeys,
    Survivors,
    SurvivorsSigned,
    Unmask,
)
from fleet_link.pki import Identity
from fleet_link.sealing import plan_digest
from fleet_link.shares import Route, SharePair


class Secrets(msgspec.Struct, frozen=True):
    """Of one box in one round. Not for a log: their text says nothing."""

    mask_secret: Bytes16
    self_secret: Bytes16
    share_key: Bytes32  # X25519, private

    def __repr__(self) -> str:
        return "Secrets(secret)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What the box knows of its part in one round. Encoded it holds the secrets: its file is 0600 and leaves with the round."""

    of: RoundOf
    name: Name
    word_bits: WordBits
    min_cohort: int
    secrets: Secrets
    keys: SignedKeys  # this box's own
    roster: Roster | None = None  # entered: the one cohort of this round
    neighbours: dict[Name, SignedKeys] = {}
    sealed: dict[Name, Packet] = {}  # this box's shares for its neighbours
    held: dict[Name, SharePair] = {}  # admitted: whom this box masks against, and their shares
    masked_sha256: bytes = b""  # masked: the one upload of this round
    survivors: Survivors | None = None  # signed: the one pair of lists of this round
    signature: bytes = b""

    def __repr__(self) -> str:
        return f"Part({self.of.round_id!r}, {self.name!r}, {self.stage!r})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("round_id", self.of.round_id), ("name", self.name), ("stage", self.stage)]

    @property
    def stage(self) -> str:
        if self.survivors:
            return "signed"
        if self.masked_sha256:
            return "masked"
        if self.held:
            return "admitted"
        return "entered" if self.roster else "begun"


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Part)


def encode(part: Part) -> bytes:
    return _encoder.encode(part)


def decode(kept: bytes) -> Part:
    """Raises SiteError on bytes that `encode` did not give."""
    try:
        return _decoder.decode(kept)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SiteError(f"the kept state of a masked round is damaged: {error}", advice="check the disk") from error


def draw_secrets() -> Secrets:
    """From the system's randomness: for the caller, once for each round."""
    return Secrets(os.urandom(16), os.urandom(16), os.urandom(32))


def begin(
    plan: RoundPlan, identity: Identity, secrets: Secrets, *, min_cohort: int, message_id: str
) -> tuple[Part, RoundKeys]:
    """`min_cohort` is the site's own; the plan can only ask for more."""
    of = RoundOf(plan.round_id, plan_digest(plan))
    public = PublicKeys(
        share_key=masking.public_bytes(_share_key(secrets)),
        mask_key=masking.public_bytes(masking.mask_key(secrets.mask_secret, of.round_id)),
        self_commitment=masking.self_commitment(secrets.self_secret, of.round_id, identity.name),
    )
    part = Part(
        of=of,
        name=identity.name,
        word_bits=plan.word_bits,
        min_cohort=cohort.smallest_allowed(min_cohort, plan.min_cohort),
        secrets=secrets,
        keys=cohort.sign_keys(identity, of, public),
    )
    return part, RoundKeys(message_id=message_id, round_id=of.round_id, plan_digest=of.plan_digest, keys=part.keys)


def enter(part: Part, shown: Cohort, judge: Judge, *, message_id: str) -> tuple[Part, Shares]:
    """Share this box's secrets among its neighbours. The same cohort again gives the same packets.

    Raises TrustError on a cohort that is not sound, not large enough, or not the one entered before.
    """
    place = Place(part.name, part.of, cohort.keys_digest(part.keys, part.name, part.of), part.min_cohort)
    everyone = cohort.verify_cohort(shown, place, judge)
    if part.roster is None:
        part = _with_shares(part, everyone, shown.neighbours)
    elif everyone != part.roster:
        raise TrustError(
            f"a second, other cohort in round {part.of.round_id}",
            advice="the hub may show each box another: inspect it",
        )
    made = Shares(
        message_id=message_id, round_id=part.of.round_id, cohort_digest=cohort.digest(everyone), sealed=part.sealed
    )
    return part, made


def admit(part: Part, forwarded: SharesForwarded) -> Part:
    """Open the neighbours' shares: their senders are whom this box masks against.

    Raises TrustError on a sender who is no neighbour, too few of them or a second choice, PeerError on a packet that does
    not open.
    """
    everyone = _entered(part)
    cohort_digest = cohort.digest(everyone)
    _check_round(part, forwarded.round_id, forwarded.cohort_digest, cohort_digest)
    if strangers := set(forwarded.sealed) - set(part.neighbours):
        raise TrustError(
            f"shares from who is no neighbour: {', '.join(sorted(strangers))[:200]}", advice="inspect the hub"
        )
    if part.held:
        if set(part.held) != set(forwarded.sealed):
            raise TrustError("a second, other choice of neighbours to mask against", advice="inspect the hub")
        return part
    _check_enough(part, "sent their shares", len(forwarded.sealed))
    left = len(everyone.names) - len(part.neighbours) + len(forwarded.sealed)
    if left < part.min_cohort:
        raise TooFewError(
            f"at most {left} boxes are left, this box asks for {part.min_cohort}",
            advice="too many boxes dropped out; the next round may do better",
        )
    own = _share_key(part.secrets)
    held = {}
    for sender, packet in forwarded.sealed.items():
        route = Route(cohort_digest, sender, part.name)
        try:
            held[sender] = shares.open(packet, route, own, part.neighbours[sender].share_key)
        except TrustError as error:
            raise PeerError(str(error), advice=f"the fleet's operator should inspect {sender}") from error
    return msgspec.structs.replace(part, held=held)


def mask(part: Part, integers: NDArray[np.signedinteger] | masking.Words) -> tuple[Part, bytes]:
    """The masked update as it leaves the box: little-endian words, as many bytes as `integers` has.

    `integers` is one vector of the plan's word size. Raises TrustError on other integers than those masked before: the
    difference of two updates under the same masks would be readable.
    """
    if not part.held:
        raise TrustError(f"nobody to mask against yet in round {part.of.round_id}")
    words = masking.as_words(integers, part.word_bits)
    plus, minus = _mask_keys(part)
    masking.apply(words, plus, minus)
    masked = masking.pack(words)
    sha256 = hashlib.sha256(masked).digest()
    if part.masked_sha256 and part.masked_sha256 != sha256:
        raise TrustError(
            f"another update was masked before in round {part.of.round_id}",
            advice="the box trained again after its update was lost; it sits this round out",
        )
    return msgspec.structs.replace(part, masked_sha256=sha256), masked


def sign_survivors(part: Part, identity: Identity, told: Survivors, *, message_id: str) -> tuple[Part, SurvivorsSigned]:
    """Raises TrustError on lists that are not sound, too short, not true as far as this box can tell, or a second pair."""
    everyone = _entered(part)
    # 1. In order, disjoint, of this cohort.
    cohort.check_survivors(told, everyone)
    # 2. One pair of lists in a round; the same again gets the same signature.
    if part.survivors and (told.active, told.dropped) != (part.survivors.active, part.survivors.dropped):
        raise TrustError(
            f"a second, other list of survivors in round {part.of.round_id}",
            advice="the hub could bare an update with two lists: inspect it",
        )
    # 3. This box is in the sum, and has indeed masked an update.
    if part.name not in told.active or not part.masked_sha256:
        raise TrustError("this box is not in the sum it shall open, or has given no update", advice="inspect the hub")
    # 4. Large enough for this site.
    if len(told.active) < part.min_cohort:
        raise TooFewError(
            f"a sum of {len(told.active)} boxes, this box asks for {part.min_cohort}",
            advice="too many boxes dropped out; the next round may do better",
        )
    # 5. Exactly the neighbours that this box masked against are accounted for.
    if wrong := (set(part.neighbours) & {*told.active, *told.dropped}) ^ set(part.held):
        raise TrustError(f"not as this box was told before: {', '.join(sorted(wrong))[:200]}", advice="inspect the hub")
    if part.survivors is None:
        part = msgspec.structs.replace(part, survivors=told, signature=cohort.sign_survivors(identity, told))
    signed = SurvivorsSigned(message_id=message_id, round_id=part.of.round_id, signature=part.signature)
    return part, signed


def unmask(part: Part, agreement: Agreement, *, message_id: str) -> Unmask:
    """Of each neighbour the share of one secret: of its own mask if it is in the sum, of its pair masks if it dropped out.

    Raises TrustError unless so many neighbours signed this box's very lists that nobody can have gathered it for others.
    """
    told = part.survivors
    if told is None or agreement.round_id != part.of.round_id:
        raise TrustError("an agreement about survivors that this box has not signed", advice="inspect the hub")
    if strangers := set(agreement.signatures) - set(part.neighbours):
        raise TrustError(f"signatures of who is no neighbour: {', '.join(sorted(strangers))[:200]}")
    signers = [
        name
        for name, signature in agreement.signatures.items()
        if name in told.active and cohort.signed_survivors(part.neighbours[name], told, signature)
    ]
    _check_enough(part, "signed the same survivors", len(signers))
    return Unmask(
        message_id=message_id,
        round_id=part.of.round_id,
        self_shares={name: pair.of_self_secret for name, pair in part.held.items() if name in told.active},
        mask_shares={name: pair.of_mask_secret for name, pair in part.held.items() if name in told.dropped},
    )


def _with_shares(part: Part, everyone: Roster, neighbours: dict[str, SignedKeys]) -> Part:
    names, own, seal_digest = sorted(neighbours), _share_key(part.secrets), cohort.digest(everyone)
    pairs = shares.split(
        part.secrets.self_secret, part.secrets.mask_secret, names, threshold=cohort.threshold(len(names))
    )
    sealed = {
        name: shares.seal(pair, Route(seal_digest, part.name, name), own, neighbours[name].share_key)
        for name, pair in pairs.items()
    }
    return msgspec.structs.replace(part, roster=everyone, neighbours=neighbours, sealed=sealed)


def _mask_keys(part: Part) -> tuple[list[bytes], list[bytes]]:
    """Of the pair masks, the one whose name comes first adds; the box's own mask is added."""
    cohort_digest = cohort.digest(_entered(part))
    own = masking.mask_key(part.secrets.mask_secret, part.of.round_id)
    plus = [masking.self_key(part.secrets.self_secret, cohort_digest, part.name)]
    minus: list[bytes] = []
    for name in part.held:
        key = masking.pair_key(own, part.name, part.neighbours[name].mask_key, name, cohort_digest)
        (plus if part.name < name else minus).append(key)
    return plus, minus


def _share_key(secrets: Secrets) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(secrets.share_key)


def _entered(part: Part) -> Roster:
    if part.roster is None:
        raise TrustError(f"no cohort yet in round {part.of.round_id}", advice="inspect the hub")
    return part.roster


def _check_round(part: Part, round_id: str, cohort_digest: bytes, own_digest: bytes) -> None:
    if round_id != part.of.round_id or cohort_digest != own_digest:
        raise TrustError(f"shares of another cohort than that of round {part.of.round_id}", advice="inspect the hub")


def _check_enough(part: Part, did: str, count: int) -> None:
    needed = cohort.threshold(len(part.neighbours))
    if count < needed:
        raise TrustError(
            f"{count} of {len(part.neighbours)} neighbours {did}, {needed} are needed",
            advice="too many boxes dropped out; the next round may do better",
        )
