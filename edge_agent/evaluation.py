"""Whether other weights read this site's own held-out cases worse: one rule for an update of ours and for a release.

Reads and writes nothing.
Never calls one case a difference: held-out reviews are few, and chance decides one of them.
"""

from dataclasses import dataclass

MAX_HELDOUT = 200  # the newest cases; enough to see a difference of a few points
TOLERATED_CASES = 1
TOLERATED_POINTS = 5.0


@dataclass(frozen=True)
class Evaluation:
    """Held-out cases of this site, read by the bundle in use and by the candidate."""

    heldout: int = 0
    correct_before: int = 0
    correct_after: int = 0

    @property
    def is_clearly_worse(self) -> bool:
        """Never without held-out cases."""
        lost = self.correct_before - self.correct_after
        return lost > TOLERATED_CASES and 100.0 * lost > TOLERATED_POINTS * self.heldout

    def __str__(self) -> str:
        return f"{self.correct_before} of {self.heldout} right before, {self.correct_after} after"
