"""The hub's side of a masked round: cohort, masked sum, survivors, and the masks taken off the sum.

Reads messages of the boxes and uploads in memory; one vector of words, whatever the number of boxes: memory is O(model).
Never does I/O, reads a clock, keeps a single upload, or can read one: only the sum of those listed as active opens.
Source: Bonawitz et al. 2017; Bell et al. 2020 (SecAgg+); the box's end is edge_agent/masking.py.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from itertools import chain, combinations, islice
from math import comb

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.robust import ROBUST_MIN
from fleet_link import cohort, masking, shares
from fleet_link.cohort import Roster, RoundOf
from fleet_link.errors import LinkError, TrustError
from fleet_link.masking import WordBits, Words, bound
from fleet_link.messages import (
    COHORT,
    MAX_MESSAGE_BYTES,
    NEIGHBOURS,
    Agreement,
    Cohort,
    Name,
    Shares,
    SharesForwarded,
    SignedKeys,
    Survivors,
    SurvivorsSigned,
    Unmask,
)

MAX_TRIES = 400  # subsets of shares for one secret: with 3 liars among 32, one in 41 has none
NEXT_ROUND = "start the round again; boxes that were away can join it"
_ROUTING_BYTES = 512  # of a Cohort besides names, digests and keys
_KEYS_BYTES = (
    272  # of one box's SignedKeys besides name and certificate: an ECDSA signature of 72, three keys, their tags
)
Alive = Callable[[], object]  # what to call now and then in long work


def _unwatched() -> None:
    pass


class Circle(msgspec.Struct, frozen=True):
    """U1: everyone of a group whose keys came, their keys (verified when they came), and the graph between them."""

    roster: Roster
    keys: dict[Name, SignedKeys]
    graph: dict[Name, tuple[Name, ...]]
    min_cohort: int

    @property
    def digest(self) -> bytes:
        return cohort.digest(self.roster)

    def threshold(self, name: str) -> int:
        return cohort.threshold(len(self.graph[name]))


class Rebuilt(msgspec.Struct, frozen=True):
    """What the survivors' shares gave: never both secrets of one box."""

    self_secrets: dict[Name, bytes]  # of active boxes
    mask_secrets: dict[Name, bytes]  # of dropped ones
    wrong_shares: tuple[
        tuple[Name, Name], ...
    ] = ()  # (of whom, told by whom): one of the two lied, nobody can say which

    def __repr__(self) -> str:
        return f"Rebuilt({len(self.self_secrets)} active, {len(self.mask_secrets)} dropped)"


# --- cohort ---------------------------------------------------------------------------------------


def form_circles(of: RoundOf, keys: Mapping[str, SignedKeys], min_cohort: int, groups: int) -> tuple[Circle, ...]:
    """The cohort of each group: as many groups as asked for, or as have enough boxes. As form_circle else."""
    if groups == 1:
        return (form_circle(of, keys, min_cohort),)
    needed = cohort.smallest_allowed(min_cohort)
    count = group_count(len(keys), groups, needed)
    if not count:
        raise LinkError(
            f"{len(keys)} boxes sent keys, {ROBUST_MIN * needed} are needed for {ROBUST_MIN} groups", advice=NEXT_ROUND
        )
    dealt = deal(cohort.roster(of, keys), count)
    return tuple(form_circle(of, {name: keys[name] for name in names}, min_cohort) for names in dealt)


def form_circle(of: RoundOf, keys: Mapping[str, SignedKeys], min_cohort: int) -> Circle:
    """`keys` went through cohort.verify_keys. Raises LinkError when too few boxes sent theirs, or too many."""
    needed = cohort.smallest_allowed(min_cohort)
    if len(keys) < needed:
        raise LinkError(f"{len(keys)} boxes sent keys, {needed} are needed", advice=NEXT_ROUND)
    check_fits({name: len(each.certificate) for name, each in keys.items()})
    everyone = cohort.roster(of, keys)
    return Circle(everyone, dict(keys), cohort.graph(everyone), needed)


def deal(everyone: Roster, count: int) -> list[list[str]]:
    """The names in groups that differ by one box at most, by a hash over the digest of plan and everybody's keys.

    So the groups are fixed only once all keys are: no box chooses its group unless it knows all others' keys before it
    sends its own, and the hub draws nothing. A hash is no beacon (cohort.ring): a hub in league with boxes can try keys for
    them, or leave boxes' keys out, until the groups please it, and with few groups few tries are enough. No box can
    check the draw, for it would prove nothing against such a hub: what protects a box is the number of honest boxes in its
    own group, for which its site's minimum cohort is asked. All others of a group of m, m - 1 boxes in league with the hub,
    read the last one.
    """
    seed = cohort.digest(everyone)
    order = sorted(everyone.names, key=lambda name: hashlib.sha256(bound("groups", seed, name)).digest())
    return [order[first::count] for first in range(count)]


def group_count(boxes: int, groups: int, smallest: int) -> int:
    """So many groups so many boxes make; 0 where they are too few for any rule."""
    count = min(groups, boxes // smallest)
    return count if groups == 1 or count >= ROBUST_MIN else 0


def largest_group(invited: int, groups: int, smallest: int) -> int:
    """Boxes in one group at most, however many of the invited send keys."""
    made = ((boxes, group_count(boxes, groups, smallest)) for boxes in range(1, invited + 1))
    return max((-(-boxes // count) for boxes, count in made if count), default=0)


def check_fits(certificate_bytes: Mapping[str, int]) -> None:
    """By name. Raises LinkError where a Cohort of all these boxes would be too large for one message."""
    count, largest = len(certificate_bytes), max(len(name) + size for name, size in certificate_bytes.items())
    listed = sum(len(name) + 2 + cohort.DIGEST_BYTES for name in certificate_bytes)
    shown = min(count - 1, NEIGHBOURS) * (largest + _KEYS_BYTES)
    if count > COHORT or listed + shown + _ROUTING_BYTES > MAX_MESSAGE_BYTES:
        raise LinkError(f"a cohort of {count} is too large for one message", advice="split the fleet into two rounds")


def cohort_for(circle: Circle, name: str, *, message_id: str) -> Cohort:
    return Cohort(
        message_id=message_id,
        round_id=circle.roster.of.round_id,
        names=circle.roster.names,
        keys_digests=b"".join(circle.roster.keys_digests),
        neighbours={other: circle.keys[other] for other in circle.graph[name]},
    )


# --- shares ---------------------------------------------------------------------------------------


def check_shares(circle: Circle, sender: str, made: Shares) -> None:
    """Raises TrustError unless `sender` made one packet for each of its neighbours in this cohort."""
    if sender not in circle.graph or made.cohort_digest != circle.digest:
        raise TrustError(f"shares of {sender} are for another cohort", advice="inspect the device")
    if set(made.sealed) != set(circle.graph[sender]):
        raise TrustError(f"shares of {sender} are not for its neighbours", advice="inspect the device")


def settle_shares(circle: Circle, senders: Collection[str]) -> tuple[str, ...]:
    """U2, sorted: those who shared and keep enough neighbours who did; who does not is left out, until all do.

    Raises LinkError when that leaves too few.
    """
    staying = set(senders) & set(circle.graph)
    while short := {name for name in staying if _within(circle, name, staying) < circle.threshold(name)}:
        staying -= short
    if len(staying) < circle.min_cohort:
        missing = set(circle.graph) - set(senders)
        raise LinkError(
            f"{len(senders)} of {len(circle.graph)} boxes sent shares; with enough neighbours {len(staying)}, "
            f"needed {circle.min_cohort}; missing: {_listed(missing)}",
            advice=NEXT_ROUND,
        )
    return tuple(sorted(staying))


def forwarded_for(
    circle: Circle, sharing: Collection[str], made: Mapping[str, Shares], name: str, *, message_id: str
) -> SharesForwarded:
    """The packets for `name` of those neighbours that are in `sharing` (U2)."""
    senders = [other for other in circle.graph[name] if other in set(sharing)]
    return SharesForwarded(
        message_id=message_id,
        round_id=circle.roster.of.round_id,
        cohort_digest=circle.digest,
        sealed={sender: made[sender].sealed[name] for sender in senders},
    )


# --- sum ------------------------------------------------------------------------------------------


class MaskedSum:
    """Σ y_i modulo the word, one upload at a time: what is in it cannot be read before the masks are off."""

    def __init__(self, count: int, word_bits: WordBits) -> None:
        self.words: Words = masking.zeros(count, word_bits)
        self._word_bits: WordBits = word_bits

    def add(self, upload: bytes) -> None:
        """Add one box's masked words, all of them or nothing. Raises TrustError on any other number of bytes."""
        words = masking.unpack(upload, len(self.words), self._word_bits)
        np.add(self.words, words, out=self.words)


# --- survivors ------------------------------------------------------------------------------------


def settle_survivors(
    circle: Circle, sharing: Collection[str], uploaded: Collection[str], *, message_id: str
) -> Survivors:
    """U3 and those of U2 that are not in it; said once in a round, whatever arrives later.

    Raises LinkError when too few uploaded, or some box's secret lies with too few of those who did.
    """
    active = set(sharing) & set(uploaded)
    dropped = set(sharing) - active
    if len(active) < circle.min_cohort:
        raise LinkError(
            f"{len(active)} of {len(sharing)} boxes uploaded, {circle.min_cohort} are needed; missing: {_listed(dropped)}",
            advice=NEXT_ROUND,
        )
    _check_reach(circle, sharing, active, missing=dropped)
    return Survivors(
        message_id=message_id,
        round_id=circle.roster.of.round_id,
        cohort_digest=circle.digest,
        active=tuple(sorted(active)),
        dropped=tuple(sorted(dropped)),
    )


def check_signature(circle: Circle, told: Survivors, name: str, signed: SurvivorsSigned) -> None:
    """Raises TrustError unless the active box `name` signed these very lists."""
    if name not in told.active or not cohort.signed_survivors(circle.keys[name], told, signed.signature):
        raise TrustError(f"{name} did not sign the survivors of this round", advice="inspect the device")


def settle_agreement(circle: Circle, told: Survivors, signers: Collection[str]) -> None:
    """Raises LinkError while so few signed that the secrets cannot be gathered. `signers` passed check_signature."""
    _check_reach(circle, (*told.active, *told.dropped), set(signers), missing=set(told.active) - set(signers))


def agreement_for(
    circle: Circle, signatures: Mapping[str, SurvivorsSigned], name: str, *, message_id: str
) -> Agreement:
    """The signatures of the neighbours of `name`, as they passed check_signature."""
    return Agreement(
        message_id=message_id,
        round_id=circle.roster.of.round_id,
        signatures={other: signatures[other].signature for other in circle.graph[name] if other in signatures},
    )


# --- unmasking ------------------------------------------------------------------------------------


def check_unmask(circle: Circle, told: Survivors, name: str, given: Unmask) -> None:
    """Raises TrustError unless `given` has, of each neighbour in the round, the one share that was asked for."""
    neighbours = set(circle.graph[name]) if name in told.active else set()
    wanted = neighbours & set(told.active), neighbours & set(told.dropped)
    if (set(given.self_shares), set(given.mask_shares)) != wanted:
        raise TrustError(f"{name} gave other shares than those asked for", advice="inspect the device")


def rebuild(circle: Circle, told: Survivors, given: Mapping[str, Unmask], *, alive: Alive = _unwatched) -> Rebuilt:
    """The self secret of each active and the mask secret of each dropped box. `given` passed check_unmask.

    About 20 ms for each box: `alive` is called before each.
    Raises LinkError when shares are missing, TrustError when those of a box do not fit what it signed.
    """
    _check_reach(circle, (*told.active, *told.dropped), set(given), missing=set(told.active) - set(given))
    wrong: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    secrets: dict[str, bytes] = {}
    for name in (*told.active, *told.dropped):
        alive()
        # Those who were on a wrong side before come last, so that one liar costs its search once.
        tellers = sorted((other for other in circle.graph[name] if other in given), key=wrong.__getitem__)
        is_active = name in told.active
        by_teller = {
            other: (given[other].self_shares if is_active else given[other].mask_shares)[name] for other in tellers
        }
        secrets[name], outside = _combine(circle, name, by_teller, is_active=is_active)
        pairs += [(name, other) for other in outside]
        wrong.update(outside)
    return Rebuilt(
        {name: secrets[name] for name in told.active}, {name: secrets[name] for name in told.dropped}, tuple(pairs)
    )


def unmask(
    total: MaskedSum, circle: Circle, told: Survivors, rebuilt: Rebuilt, *, alive: Alive = _unwatched
) -> NDArray[np.signedinteger]:
    """Take the masks off, in place: Σ x_i of the active boxes modulo the word, as signed integers over the same memory.

    `total` holds exactly the uploads of the active boxes; it is spent afterwards. `alive`: as in rebuild.
    """
    cohort_digest, active = circle.digest, set(told.active)
    plus: list[bytes] = []
    minus = [masking.self_key(secret, cohort_digest, name) for name, secret in rebuilt.self_secrets.items()]
    for name, secret in rebuilt.mask_secrets.items():
        alive()
        own = masking.mask_key(secret, circle.roster.of.round_id)
        for other in circle.graph[name]:
            if other in active:
                key = masking.pair_key(own, name, circle.keys[other].mask_key, other, cohort_digest)
                (minus if other < name else plus).append(key)
    for begin in range(0, max(len(plus), len(minus)), masking.OPEN_STREAMS):
        alive()
        some = slice(begin, begin + masking.OPEN_STREAMS)
        masking.apply(total.words, plus[some], minus[some])
    return masking.as_integers(total.words)


def _combine(
    circle: Circle, name: str, by_teller: Mapping[str, bytes], *, is_active: bool
) -> tuple[bytes, tuple[str, ...]]:
    """The one secret that fits what `name` signed, and who told a share off its polynomial (looked for only on a lie)."""
    numbers = {other: number for number, other in enumerate(circle.graph[name], 1)}

    def combined(tellers: Iterable[str]) -> bytes:
        return shares.combine({numbers[other]: by_teller[other] for other in tellers})

    for tries, subset in enumerate(_subsets(tuple(by_teller), circle.threshold(name))):
        secret = combined(subset)
        if not _fits(circle, name, secret, is_active=is_active):
            continue
        rest = [other for other in by_teller if other not in subset] if tries else []
        return secret, tuple(other for other in rest if combined((*subset[1:], other)) != secret)
    raise TrustError(
        f"the shares of one box's secret do not fit its signed keys: either that box ({name}) dealt wrong shares, "
        f"or some of the {len(by_teller)} boxes that returned them changed theirs",
        advice=f"nothing was read; {NEXT_ROUND}; if it happens again with the same box, leave it out",
    )


def _fits(circle: Circle, name: str, secret: bytes, *, is_active: bool) -> bool:
    keys, round_id = circle.keys[name], circle.roster.of.round_id
    if is_active:
        return masking.self_commitment(secret, round_id, name) == keys.self_commitment
    return masking.public_bytes(masking.mask_key(secret, round_id)) == keys.mask_key


def _subsets(tellers: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    """All subsets while they are few; else MAX_TRIES: every run around the circle, which finds one liar, then at random."""
    if comb(len(tellers), size) <= MAX_TRIES:
        return combinations(tellers, size)
    chance = random.Random(0)  # noqa: S311  # an order to try things in, the same each time; no secret hangs on it
    runs = ((tellers * 2)[begin : begin + size] for begin in range(len(tellers)))
    picks = (tuple(chance.sample(tellers, size)) for _ in range(MAX_TRIES))
    return islice(chain(runs, picks), MAX_TRIES)


def _check_reach(
    circle: Circle, of_whom: Collection[str], by_whom: Collection[str], *, missing: Collection[str]
) -> None:
    """Raises LinkError unless each of `of_whom` has enough neighbours among `by_whom`."""
    reached = set(by_whom)
    short = {name: circle.threshold(name) - _within(circle, name, reached) for name in of_whom}
    if short := {name: count for name, count in sorted(short.items()) if count > 0}:
        raise LinkError(
            f"{max(short.values())} shares short for {_listed(short)}; missing: {_listed(missing)}", advice=NEXT_ROUND
        )


def _within(circle: Circle, name: str, others: Set[str]) -> int:
    return len(others & set(circle.graph[name]))


def _listed(names: Collection[str]) -> str:
    shown = sorted(names)
    return (", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")) or "nobody"
