"""Masked rounds: what secure aggregation costs a box and the hub, by number of boxes, size of the update and drop-outs.

Runs the whole protocol in one process and one thread, every box real, with real certificates; checks each sum to the last bit.
Never counts training, the network or the disk; no peer here.
"""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.processes import HouseError
from cloud_hub import ca, secure_sum
from cloud_hub.secure_sum import Circle, MaskedSum
from edge_agent import masking as box
from edge_agent.masking import Part
from fleet_link import cohort, masking
from fleet_link.cohort import Judge, RoundOf
from fleet_link.errors import LinkError
from fleet_link.messages import RoundPlan, Survivors, encode
from fleet_link.pki import Identity, Trust
from fleet_link.sealing import plan_digest

BOXES, QUICK_BOXES = (8, 32, 128, 512), (8, 40)
PARAMETERS, QUICK_PARAMETERS = (1_000_000, 5_000_000), (1_000_000,)
DROP_OUTS = (0.0, 0.1, 0.3)
DRAWS = 200  # of random drop-outs, to see how many rounds survive them
ID = "0" * 32
PLAN = RoundPlan(
    message_id=ID,
    round_id="bench",
    kind="masked",
    base_digest="a" * 64,
    rule="fedavg",
    trainable="all",
    clip_norm=1.0,
    epochs=1,
    learning_rate=0.001,
    min_examples=1,
    seed=1,
    sealing_key=bytes(32),
    deadline_unix_s=2e9,
)

Integers = NDArray[np.int32]


class Stopwatch:
    """Milliseconds of each repetition, by what was done: the thread's own processor time, so that neighbours do not count."""

    def __init__(self) -> None:
        self.times_ms: dict[str, list[float]] = {}

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        begin = time.thread_time()
        yield
        self.times_ms.setdefault(what, []).append((time.thread_time() - begin) * 1e3)

    def median_ms(self, what: str) -> float:
        return median(self.times_ms[what])

    def total_ms(self, *what: str) -> float:
        return sum(sum(self.times_ms[each]) for each in what)


@dataclass
class Fleet:
    """Boxes whose shares are opened: all but the update, which has no size yet."""

    circle: Circle
    identities: dict[str, Identity]
    parts: dict[str, Part]
    watch: Stopwatch
    message_bytes: int  # of the largest message of the set-up


@dataclass
class Outcome:
    """One pattern of drop-outs: who is left, the sum so far, and the plain sum it must come to."""

    drop_out: float
    told: Survivors
    spread: bool
    survived: float  # of random patterns as large
    masked: MaskedSum
    plain: Integers
    watch: Stopwatch = field(default_factory=Stopwatch)


def measure(*, quick: bool) -> dict[str, Any]:
    """Raises HouseError if any sum is not the plain sum."""
    rows = []
    parameters = QUICK_PARAMETERS if quick else PARAMETERS
    for boxes in QUICK_BOXES if quick else BOXES:
        fleet = _fleet(boxes)
        for count in parameters:
            rows += _rounds(fleet, count)
    return {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "real_boxes": "all",
        "one_mask": [{"parameters": count, "word_bits": bits} | _one_mask(count, bits) for count, bits in _masks()],
        "rounds": rows,
    }


def table(result: dict[str, Any]) -> Table:
    masks = ", ".join(
        f"{row['parameters'] / 1e6:.0f} M of {row['word_bits']} bits {row['alone_ms']:.1f} alone, {row['of_many_ms']:.1f} of 32"
        for row in result["one_mask"]
    )
    shown = Table(
        title=f"Masked rounds in one thread, ms of its processor time; all boxes real ({result['cores']} cores, load {result['load_average']:.1f})",
        caption=f"One mask: {masks}. Set-up: own keys, checking and sealing for the neighbours, opening theirs. "
        "Survive: of 200 random patterns of drop-outs as large; where fewer than half do, the round was measured with "
        "drop-outs spread evenly over the ring (*).",
    )
    for column in (
        "boxes",
        "parameters",
        "drop out",
        "survive",
        "box: set-up",
        "box: masking",
        "box: unmasking",
        "upload × float32",
        "hub: set-up",
        "hub: one upload",
        "hub: secrets",
        "hub: masks off",
        "all in turn, s",
    ):
        shown.add_column(column, justify="right")
    for row in result["rounds"]:
        shown.add_row(
            str(row["boxes"]),
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['dropped']}{'*' if row['spread'] else ''}",
            f"{row['survived']:.0%}",
            *(f"{row[key]:.1f}" for key in ("box_setup_ms", "box_mask_ms", "box_unmask_ms")),
            f"{row['upload_ratio']:.2f}",
            *(f"{row[key]:.1f}" for key in ("hub_setup_ms", "hub_add_ms", "hub_secrets_ms", "hub_masks_off_ms")),
            f"{row['serial_s']:.2f}",
        )
    return shown


# --- a fleet up to its opened shares --------------------------------------------------------------


def _fleet(boxes: int) -> Fleet:
    watch, of = Stopwatch(), RoundOf(PLAN.round_id, plan_digest(PLAN))
    identities, judge = _identities([f"box-{number:04}" for number in range(boxes)])
    parts: dict[str, Part] = {}
    keys = {}
    for name, identity in identities.items():
        with watch.of("box keys"):
            parts[name], message = box.begin(PLAN, identity, box.draw_secrets(), min_cohort=3, message_id=ID)
        with watch.of("hub keys"):
            cohort.verify_keys(message.keys, name, of, judge)
        keys[name] = message.keys
    with watch.of("hub circle"):
        circle = secure_sum.form_circle(of, keys, 3)
    made, largest = {}, 0
    for name in identities:
        with watch.of("hub cohort"):
            shown = secure_sum.cohort_for(circle, name, message_id=ID)
        with watch.of("box shares"):
            parts[name], made[name] = box.enter(parts[name], shown, judge, message_id=ID)
        largest = max(largest, len(encode(shown)))
    with watch.of("hub circle"):
        sharing = secure_sum.settle_shares(circle, made)
    for name in sharing:
        with watch.of("hub forward"):
            forwarded = secure_sum.forwarded_for(circle, sharing, made, name, message_id=ID)
        with watch.of("box opening"):
            parts[name] = box.admit(parts[name], forwarded)
    return Fleet(circle, identities, parts, watch, largest)


def _identities(names: list[str]) -> tuple[dict[str, Identity], Judge]:
    now = time.time()
    authority = ca.create(ec.generate_private_key(ec.SECP256R1()), name="bench", now=now)
    identities = {}
    for name in names:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = authority.issue_device(key.public_key(), name, days=1, now=now)
        identities[name] = Identity(name, key, certificate.public_bytes(Encoding.DER))
    return identities, Judge(Trust(authority.pem), now)


# --- rounds ---------------------------------------------------------------------------------------


def _rounds(fleet: Fleet, count: int) -> list[dict[str, Any]]:
    """Each box masks once; its upload goes into the sum of every pattern of drop-outs that it does not drop out of."""
    outcomes = [_outcome(fleet, share, count) for share in DROP_OUTS]
    watch, masked_parts, upload_bytes = Stopwatch(), {}, 0
    for number, name in enumerate(fleet.parts):
        update = np.random.default_rng(number).integers(-(2**20), 2**20, count, dtype=np.int32)
        with watch.of("box mask"):
            masked_parts[name], upload = box.mask(fleet.parts[name], update)
        upload_bytes = len(upload)
        for outcome in outcomes:
            if name in outcome.told.active:
                with outcome.watch.of("hub add"):
                    outcome.masked.add(upload)
                outcome.plain += update
    return [
        _row(fleet, outcome, watch, masked_parts) | {"upload_ratio": upload_bytes / (4 * count)} for outcome in outcomes
    ]


def _outcome(fleet: Fleet, share: float, count: int) -> Outcome:
    names, chance = list(fleet.parts), random.Random(1)
    dropping = max(1, round(share * len(names))) if share else 0
    draws = [_survivors(fleet, set(chance.sample(names, dropping))) for _ in range(DRAWS)]
    survived = [told for told in draws if told]
    spread = len(survived) < DRAWS / 2
    told = _survivors(fleet, _spread(fleet, dropping)) if spread else survived[0]
    if told is None:
        raise HouseError(f"{dropping} of {len(names)} boxes dropped out: no round survives that")
    zeros = np.zeros(count, np.int32)
    return Outcome(share, told, spread, len(survived) / DRAWS, MaskedSum(count, 32), zeros)


def _survivors(fleet: Fleet, dropped: set[str]) -> Survivors | None:
    try:
        return secure_sum.settle_survivors(fleet.circle, fleet.parts, fleet.parts.keys() - dropped, message_id=ID)
    except LinkError:
        return None


def _spread(fleet: Fleet, dropping: int) -> set[str]:
    ring = cohort.ring(fleet.circle.roster)
    return {ring[number * len(ring) // dropping] for number in range(dropping)}


def _row(fleet: Fleet, outcome: Outcome, masking_watch: Stopwatch, masked_parts: dict[str, Part]) -> dict[str, Any]:
    watch, told, circle = outcome.watch, outcome.told, fleet.circle
    parts, signed, given = {}, {}, {}
    for name in told.active:
        with watch.of("box sign"):
            parts[name], signed[name] = box.sign_survivors(
                masked_parts[name], fleet.identities[name], told, message_id=ID
            )
        with watch.of("hub signature"):
            secure_sum.check_signature(circle, told, name, signed[name])
    for name in told.active:
        with watch.of("hub agreement"):
            agreement = secure_sum.agreement_for(circle, signed, name, message_id=ID)
        with watch.of("box unmask"):
            given[name] = box.unmask(parts[name], agreement, message_id=ID)
    with watch.of("hub secrets"):
        rebuilt = secure_sum.rebuild(circle, told, given)
    with watch.of("hub masks off"):
        total = secure_sum.unmask(outcome.masked, circle, told, rebuilt)
    if not np.array_equal(total, outcome.plain):
        raise HouseError(f"{len(fleet.parts)} boxes, {len(told.dropped)} dropped: the sum is wrong")
    setup, setup_hub = (
        ("box keys", "box shares", "box opening"),
        ("hub keys", "hub circle", "hub cohort", "hub forward"),
    )
    late = ("box sign", "hub signature", "hub agreement", "box unmask", "hub add", "hub secrets", "hub masks off")
    return {
        "boxes": len(fleet.parts),
        "parameters": len(outcome.plain),
        "drop_out": outcome.drop_out,
        "dropped": len(told.dropped),
        "spread": outcome.spread,
        "survived": outcome.survived,
        "largest_message_bytes": fleet.message_bytes,
        "box_setup_ms": sum(fleet.watch.median_ms(what) for what in setup),
        "box_mask_ms": masking_watch.median_ms("box mask"),
        "box_unmask_ms": watch.median_ms("box sign") + watch.median_ms("box unmask"),
        "hub_setup_ms": fleet.watch.total_ms(*setup_hub),
        "hub_add_ms": watch.median_ms("hub add"),
        "hub_secrets_ms": watch.total_ms("hub secrets"),
        "hub_masks_off_ms": watch.total_ms("hub masks off"),
        "serial_s": (
            fleet.watch.total_ms(*setup, *setup_hub) + masking_watch.total_ms("box mask") + watch.total_ms(*late)
        )
        / 1e3,
    }


# --- one mask -------------------------------------------------------------------------------------


def _masks() -> Iterator[tuple[int, masking.WordBits]]:
    bits: tuple[masking.WordBits, ...] = (16, 32)
    yield from product((5_000_000,), bits)


def _one_mask(count: int, word_bits: masking.WordBits) -> dict[str, float]:
    """Best of five: by itself, and per mask when 32 are applied in one pass."""
    words = masking.zeros(count, word_bits)
    watch, keys = Stopwatch(), [os.urandom(32) for _ in range(32)]
    for _ in range(5):
        with watch.of("alone"):
            masking.apply(words, keys[:1], [])
        with watch.of("many"):
            masking.apply(words, keys[:16], keys[16:])
    return {"alone_ms": min(watch.times_ms["alone"]), "of_many_ms": min(watch.times_ms["many"]) / len(keys)}
