"""`python -m benchmarks.link.box edge-agent.toml`: a box's daemon as it is installed, but for its training.

Real: every thread, database, link, policy, learner, codec, masking and sealing of edge_agent. Made up: the reviewed
cases (rows whose arrays are empty), and `learn.train`, which gives the base plus noise instead of a child process's weights.
Never sends anything that edge_agent would not.
"""

import sqlite3
import sys
import time
from pathlib import Path
from unittest.mock import patch

from benchmarks.link import dummy
from edge_agent import config, daemon, database, identity, learn
from edge_agent.learn import Report, Trained
from fleet_link.messages import RoundPlan
from models.bundle import Bundle, read_bundle

EXAMPLES = 8


def main() -> int:
    settings = config.load(Path(sys.argv[1]))
    device = identity.load(settings.box.data_dir).identity.name

    def train(plan: RoundPlan, base: Bundle, *_: object) -> Trained:
        begin = time.perf_counter()
        weights = base.weights
        of = {name: value.shape for name, value in weights.items()}
        made_up = dummy.change(device, plan.seed, of, plan.clip_norm)
        after = {name: weights[name] + value for name, value in made_up.items()}
        return Trained(after, Report(EXAMPLES, 0, 0, 0, time.perf_counter() - begin, 0))

    with patch.object(learn, "train", train):
        daemon.run(settings)
    return 0


def make_up_cases(data_dir: Path, bundle: Path, first: int = 1, count: int = EXAMPLES) -> None:
    """Reviewed series that the policy may learn from: before the daemon starts, or as new ones while it runs."""
    spec = next(spec for spec in read_bundle(bundle).manifest.inputs if spec.modality == "XR")
    db = database.connect(data_dir)
    try:
        for number in range(first, first + count):
            with database.transaction(db):
                _insert(db, number, learn.example_path(number, spec))
            path = data_dir / learn.example_path(number, spec)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    finally:
        db.close()


def _insert(db: sqlite3.Connection, number: int, path: str) -> None:
    db.execute(
        "INSERT INTO series(series_no, StudyInstanceUID, SeriesInstanceUID, Modality, state, version,"
        " first_instance_at, last_instance_at) VALUES (?, ?, ?, 'DX', 'reported', 1, 0, 0)",
        (number, f"1.2.{number}", f"1.2.{number}.1"),
    )
    db.execute("INSERT INTO results VALUES (?, ?, 1, 'd', 0, 'CPU', '{}', '', 0, 0, 0)", (number, number))
    db.execute(
        "INSERT INTO reviews(review_no, result_no, series_no, verdict, label, reviewer, reviewed_at)"
        " VALUES (?, ?, ?, 'accepted', 'normal', 'bench', 0)",
        (number, number, number),
    )
    db.execute("INSERT INTO examples VALUES (?, ?, 'XR', 'normal', 'train', ?)", (number, number, path))


if __name__ == "__main__":
    sys.exit(main())
