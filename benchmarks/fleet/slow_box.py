"""`python -m benchmarks.fleet.slow_box edge-agent.toml`: the link bench's box, whose training takes a while: it can be killed in it.

Real and made up: as benchmarks.link.box says.
Never faster than TRAINING_S.
"""

import sys
import time
from collections.abc import Mapping
from unittest.mock import patch

from benchmarks.link import box, dummy
from benchmarks.link.dummy import Arrays

TRAINING_S = 3.0

_change = dummy.change


def slow_change(device: str, round_seed: int, of: Mapping[str, tuple[int, ...]], clip_norm: float) -> Arrays:
    time.sleep(TRAINING_S)
    return _change(device, round_seed, of, clip_norm)


def main() -> int:
    with patch.object(dummy, "change", slow_change):
        return box.main()


if __name__ == "__main__":
    sys.exit(main())
