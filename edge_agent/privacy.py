"""The site's privacy budget: what rounds with noise have cost this box, and what those that it joined may yet cost.

Reads and writes the table `privacy_costs`; what its rows come to, models.accountant says.
Never forgets what was spent: not with the round, its release or its hub, for the images are the same.
Source: models.accountant; ARCHITECTURE.md, "The link": "The site decides".
"""

import logging
import sqlite3
from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path

from fleet_link.messages import RoundPlan
from fleet_link.sealing import plan_digest
from models import accountant, delta, round_layout
from models.accountant import Cost
from models.bundle import read_bundle
from models.errors import BundleError, DeltaError

log = logging.getLogger(__name__)


@lru_cache(maxsize=4)
def cost_of(plan: RoundPlan, base: Path, honest: int) -> Cost | None:
    """None for a round without noise, or where the words of this base's weights have no room for it.

    Of the boxes whose noise the plan counts on only `honest` are believed to add theirs: the plan is the hub's word, and
    it may have enrolled the others itself. `base` is named by its digest.
    """
    try:
        weights = read_bundle(base).weights
        shapes = {name: weights[name].shape for name in delta.trainable_names(weights, plan.trainable)}
        cost = accountant.cost_of(round_layout.layout_of(plan, plan_digest(plan), shapes))
    except (BundleError, DeltaError) as error:
        log.warning("round %s: %s", plan.round_id, error)
        return None
    if cost is None:
        return None
    return replace(cost, variance=cost.variance * min(honest, plan.noise_boxes) // plan.noise_boxes)


def pledge(db: sqlite3.Connection, round_id: str, cost: Cost) -> None:
    """From joining on: two rounds at a time cannot both have the last of the budget."""
    db.execute(
        "INSERT INTO privacy_costs (round_id, l2_squared, l1, variance) VALUES (?, ?, ?, ?)", (round_id, *astuple(cost))
    )


def spend(db: sqlite3.Connection, round_id: str) -> None:
    """In the transaction that lets the update go."""
    db.execute("UPDATE privacy_costs SET is_spent = 1 WHERE round_id = ?", (round_id,))


def release(db: sqlite3.Connection, round_id: str) -> None:
    """The round is over for this box. What was spent stays spent."""
    db.execute("DELETE FROM privacy_costs WHERE round_id = ? AND is_spent = 0", (round_id,))


def spent(db: sqlite3.Connection) -> list[Cost]:
    return _costs(db, "is_spent = 1")


def spent_or_pledged(db: sqlite3.Connection) -> list[Cost]:
    return _costs(db, "1")


def pledged_for(db: sqlite3.Connection, round_id: str) -> Cost | None:
    return next(iter(_costs(db, "round_id = ? AND is_spent = 0", round_id)), None)


def _costs(db: sqlite3.Connection, where: str, *values: str) -> list[Cost]:
    rows = db.execute(f"SELECT l2_squared, l1, variance FROM privacy_costs WHERE {where}", values)  # noqa: S608
    return [Cost(*row) for row in rows]
