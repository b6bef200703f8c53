"""Which examples take part in a round: every verdict that is new since the last counted round, and a share of the older ones.

Reads rounds and counters; writes one counter for each modality of a sealed round.
Never draws without a seed and never leaves a new verdict out.
Source: rehearsal against forgetting (Robins 1995).
"""

import sqlite3
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

import numpy as np

from edge_agent import database
from edge_agent.learn import Example
from edge_agent.rounds import COUNTED, State
from fleet_link import messages
from fleet_link.messages import RoundPlan
from models.spec import MODALITIES

# The reason of a sealed round until the hub's receipt, which clears it: a round that closes before keeps it.
NOT_COUNTED = "the hub has not yet confirmed this box's update"
# Counter of a modality and a round: the newest verdict that its update was trained on.
LEARNED_UP_TO = "learned up to, "
# Counter of a round: a sum that this box's update is in may have been read.
OPENED = "opened, "
NEWEST_COUNTED = """
    SELECT COALESCE(MAX(c.value), 0) FROM counters c JOIN rounds r ON c.name = ? || r.round_id
    WHERE r.state IN (?, ?, ?) OR (r.state = ? AND r.update_path <> '' AND r.reason = '')
"""


def choose(examples: Sequence[Example], learned: Mapping[str, int], older_max: int, seed: int) -> list[Example]:
    """All that are new after `learned`, and at most `older_max` others, evenly over modalities and labels.

    In the order of `examples`; equal seeds draw equally.
    """
    older = [example for example in examples if not is_new(example, learned)]
    drawn = {example.series_no for example in _evenly(older, older_max, seed)}
    return [example for example in examples if is_new(example, learned) or example.series_no in drawn]


def is_new(example: Example, learned: Mapping[str, int]) -> bool:
    return example.review_no > learned.get(example.modality, 0)


def learned_up_to(db: sqlite3.Connection) -> dict[str, int]:
    """By modality the newest verdict in an update that the hub has counted, and whose round it did not drop."""
    found = {}
    for modality in MODALITIES:
        (newest,) = db.execute(NEWEST_COUNTED, (_counter(modality, ""), *COUNTED, State.CLOSED)).fetchone()
        if newest:
            found[modality] = int(newest)
    return found


def new_since_opened(db: sqlite3.Connection, base_digest: str, examples: Sequence[Example]) -> int | None:
    """How many of `examples` no opened sum with an update over this base has seen; None where there is no such sum.

    What counts is what the box's update was trained from: in a buffered round that may be older than the plan's base.
    """
    opened = [
        row["round_id"]
        for row in db.execute(
            "SELECT r.round_id, r.plan, s.base_digest FROM rounds r JOIN counters c ON c.name = ? || r.round_id"
            " LEFT JOIN stale_updates s ON s.round_id = r.round_id",
            (OPENED,),
        )
        if (row["base_digest"] or _base_of(row["plan"])) == base_digest
    ]
    if not opened:
        return None
    seen = {
        modality: max(database.counter(db, _counter(modality, round_id)) for round_id in opened)
        for modality in MODALITIES
    }
    return sum(is_new(example, seen) for example in examples)


def note_opened(db: sqlite3.Connection, round_id: str) -> None:
    database.keep(db, f"{OPENED}{round_id}", 1)


def keep_learned(db: sqlite3.Connection, round_id: str, examples: Sequence[Example]) -> None:
    """What the round's update, sealed next, was trained on. Counts as soon as the hub counts it."""
    newest: dict[str, int] = {}
    for example in examples:
        newest[example.modality] = max(example.review_no, newest.get(example.modality, 0))
    for modality, review_no in newest.items():
        database.keep(db, _counter(modality, round_id), review_no)


def forget(db: sqlite3.Connection) -> None:
    """Another hub has counted nothing of this box yet: every verdict is new to it."""
    db.execute("DELETE FROM counters WHERE substr(name, 1, ?) = ?", (len(LEARNED_UP_TO), LEARNED_UP_TO))


def _base_of(kept_plan: bytes) -> str:
    plan = messages.decode(kept_plan)
    assert isinstance(plan, RoundPlan)  # we wrote it
    return plan.base_digest


def _counter(modality: str, round_id: str) -> str:
    return f"{LEARNED_UP_TO}{modality} {round_id}"


def _evenly(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """One of each modality and label in turn, until there are enough; where one runs out, the others fill up."""
    groups: dict[tuple[str, str], list[Example]] = {}
    for index in np.random.default_rng(seed).permutation(len(examples)):
        groups.setdefault((examples[index].modality, examples[index].label), []).append(examples[index])
    in_turn = chain.from_iterable(zip_longest(*groups.values()))
    return [example for example in in_turn if example is not None][:most]
