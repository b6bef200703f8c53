"""Who stands in a masked round: signed keys, the cohort and its graph, and what was agreed about its survivors.

Reads and writes values in memory; signatures are the devices' (ECDSA P-256).
Never trusts a name without the device's certificate; never draws the graph from anything the hub could leave out.
Source: Bell et al. 2020, "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (SecAgg+).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from fleet_link.errors import TooFewError, TrustError
from fleet_link.masking import bound
from fleet_link.messages import NEIGHBOURS, Bytes32, Cohort, Name, SignedKeys, Survivors
from fleet_link.pki import Identity, Trust, parse_certificate

DIGEST_BYTES = 32
SMALLEST_COHORT = 2  # whatever anybody configures: a sum of one is no sum


class RoundOf(msgspec.Struct, frozen=True):
    """What every signature of a masked round is bound to."""

    round_id: Name
    plan_digest: Bytes32


class Roster(msgspec.Struct, frozen=True):
    """Everyone whose keys came in time, in the order of their names."""

    of: RoundOf
    names: tuple[Name, ...]
    keys_digests: tuple[Bytes32, ...]


@dataclass(frozen=True)
class PublicKeys:
    share_key: bytes
    mask_key: bytes
    self_commitment: bytes


@dataclass(frozen=True)
class Judge:
    """By what a box or the hub believes a device's certificate."""

    trust: Trust
    now: float  # unix s


# --- keys -----------------------------------------------------------------------------------------


def sign_keys(identity: Identity, of: RoundOf, keys: PublicKeys) -> SignedKeys:
    statement = _keys_statement(of, identity.name, keys.share_key, keys.mask_key, keys.self_commitment)
    return SignedKeys(
        share_key=keys.share_key,
        mask_key=keys.mask_key,
        self_commitment=keys.self_commitment,
        signature=identity.sign(statement),
        certificate=identity.certificate_der,
    )


def verify_keys(keys: SignedKeys, name: str, of: RoundOf, judge: Judge) -> None:
    """Raises TrustError unless the device `name`, certified by this fleet's CA, signed these keys for this very round."""
    public_key = judge.trust.check(keys.certificate, expected_name=name, now=judge.now)
    statement = _keys_statement(of, name, keys.share_key, keys.mask_key, keys.self_commitment)
    if not _is_signed(public_key, statement, keys.signature):
        raise TrustError(
            f"the keys of {name} are not signed by it for round {of.round_id} and this plan",
            advice="keys of another round, plan or device; if it goes on, inspect that device and the hub",
        )


def keys_digest(keys: SignedKeys, name: str, of: RoundOf) -> bytes:
    """SHA-256 over the signed statement; not over the signature, which has a second valid form."""
    return hashlib.sha256(_keys_statement(of, name, keys.share_key, keys.mask_key, keys.self_commitment)).digest()


# --- cohort and graph -----------------------------------------------------------------------------


def roster(of: RoundOf, keys: Mapping[str, SignedKeys]) -> Roster:
    names = tuple(sorted(keys))
    return Roster(of, names, tuple(keys_digest(keys[name], name, of) for name in names))


def digest(everyone: Roster) -> bytes:
    """Covers round, plan, names and all public keys: two boxes with the same one are in the same round."""
    parts: tuple[str | bytes, ...] = (*everyone.names, *everyone.keys_digests)
    return hashlib.sha256(bound("cohort", everyone.of.round_id, everyone.of.plan_digest, *parts)).digest()


def graph(everyone: Roster) -> dict[str, tuple[str, ...]]:
    """Each box's neighbours, sorted: everyone else while that is 32 at most, else the nearest 32 on a ring."""
    names = everyone.names
    if len(names) - 1 <= NEIGHBOURS:
        return {name: tuple(other for other in names if other != name) for name in names}
    order = ring(everyone)
    steps = [step for step in range(-NEIGHBOURS // 2, NEIGHBOURS // 2 + 1) if step]
    return {
        name: tuple(sorted(order[(position + step) % len(order)] for step in steps))
        for position, name in enumerate(order)
    }


def ring(everyone: Roster) -> list[str]:
    """The names in the order of a hash over the cohort digest, so it is fixed only once everybody's keys are.

    A hash is no beacon: a hub in league with boxes can try many keys for them, and so many rings. It reads a box only if
    13 of that box's 32 neighbours are in league with it (threshold); up to 33 boxes there is no ring to choose.
    """
    seed = digest(everyone)
    return sorted(everyone.names, key=lambda name: hashlib.sha256(bound("ring", seed, name)).digest())


def threshold(neighbours: int) -> int:
    """So many of a box's neighbours rebuild a secret of it, and so many must sign the survivors.

    Above two thirds: an honest box helps one list of survivors only, so to gather it twice, for both secrets of a box by two
    lists, 2·threshold - neighbours + 1 of its neighbours must be in league with the hub: more than a third, 13 of 32.
    """
    return 2 * neighbours // 3 + 1


def smallest_allowed(*wanted: int) -> int:
    return max(SMALLEST_COHORT, *wanted)


@dataclass(frozen=True)
class Place:
    """What a box knows of itself when the hub shows it a cohort."""

    name: str
    of: RoundOf
    keys_digest: bytes
    min_cohort: int


def verify_cohort(shown: Cohort, place: Place, judge: Judge) -> Roster:
    """Give the roster a box may share its secrets in. Raises TrustError with what is wrong with the one shown.

    A certificate is the hub's word that a device exists: against a hub that certifies devices of its own, no cohort helps.
    """
    everyone = Roster(place.of, shown.names, _cut(shown.keys_digests, shown.names))
    # 1. Of this round, each name once.
    if shown.round_id != place.of.round_id:
        raise TrustError(f"cohort of round {shown.round_id}, not of {place.of.round_id}")
    _check_sorted("cohort", shown.names)
    # 2. Large enough for this site.
    if len(shown.names) < place.min_cohort:
        raise TooFewError(
            f"a cohort of {len(shown.names)}, this box asks for {place.min_cohort}",
            advice="too few boxes take part: invite more, or lower the site's minimum cohort",
        )
    # 3. This box is in it, with the keys it sent.
    listed = dict(zip(everyone.names, everyone.keys_digests, strict=True))
    if listed.get(place.name) != place.keys_digest:
        raise TrustError("the cohort does not have this box with the keys it sent", advice="inspect the hub")
    # 4. Its neighbours are those of the graph, and no others.
    neighbours = graph(everyone)[place.name]
    if set(shown.neighbours) != set(neighbours):
        strangers = ", ".join(sorted(set(shown.neighbours) ^ set(neighbours)))
        raise TrustError(f"neighbours differ from the cohort's graph: {strangers[:200]}", advice="inspect the hub")
    # 5. Each neighbour's keys are signed by it, and are the keys that everybody sees.
    for name in neighbours:
        verify_keys(shown.neighbours[name], name, place.of, judge)
        if keys_digest(shown.neighbours[name], name, place.of) != listed[name]:
            raise TrustError(f"the cohort lists other keys of {name} than those shown", advice="inspect the hub")
    return everyone


# --- survivors ------------------------------------------------------------------------------------


def check_survivors(told: Survivors, everyone: Roster) -> None:
    """Raises TrustError unless both lists are sorted, disjoint and of this cohort."""
    if told.round_id != everyone.of.round_id or told.cohort_digest != digest(everyone):
        raise TrustError(f"survivors of another cohort than that of round {everyone.of.round_id}")
    _check_sorted("active list", told.active)
    _check_sorted("dropped list", told.dropped)
    if both := set(told.active) & set(told.dropped):
        raise TrustError(
            f"listed as active and as dropped: {', '.join(sorted(both))[:200]}",
            advice="both secrets of one box would bare its update; inspect the hub",
        )
    if strangers := {*told.active, *told.dropped} - set(everyone.names):
        raise TrustError(f"not in the cohort: {', '.join(sorted(strangers))[:200]}", advice="inspect the hub")


def sign_survivors(identity: Identity, told: Survivors) -> bytes:
    return identity.sign(_survivors_statement(told))


def signed_survivors(keys: SignedKeys, told: Survivors, signature: bytes) -> bool:
    """Whether the device whose keys these are, verified before, signed these very lists."""
    public_key = parse_certificate(keys.certificate).public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey):
        return False
    return _is_signed(public_key, _survivors_statement(told), signature)


def _keys_statement(of: RoundOf, name: str, share_key: bytes, mask_key: bytes, commitment: bytes) -> bytes:
    return bound("keys", of.round_id, of.plan_digest, name, share_key, mask_key, commitment)


def _survivors_statement(told: Survivors) -> bytes:
    lists = (hashlib.sha256(bound("names", *names)).digest() for names in (told.active, told.dropped))
    return bound("survivors", told.round_id, told.cohort_digest, *lists)


def _is_signed(public_key: ec.EllipticCurvePublicKey, statement: bytes, signature: bytes) -> bool:
    try:
        public_key.verify(signature, statement, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


def _cut(digests: bytes, names: tuple[str, ...]) -> tuple[bytes, ...]:
    if len(digests) != DIGEST_BYTES * len(names):
        raise TrustError(f"{len(digests)} bytes of key digests for {len(names)} names", advice="inspect the hub")
    return tuple(digests[begin : begin + DIGEST_BYTES] for begin in range(0, len(digests), DIGEST_BYTES))


def _check_sorted(what: str, names: tuple[str, ...]) -> None:
    if any(first >= second for first, second in pairwise(names)):
        raise TrustError(f"the {what} is not in order, each name once", advice="inspect the hub")
