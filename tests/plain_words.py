"""Run `edge-agent` and keep its newest update as it is before the masks: what a test adds up by itself.

python -m tests.plain_words FILE.npy edge-agent ARGUMENTS…
"""

import sys
from typing import Any

import numpy as np

from edge_agent import cli, update


def main() -> None:
    path, *sys.argv = sys.argv[1:]
    keep(path)
    cli.main()


def keep(path: str) -> None:
    original = update.to_words

    def to_words(*args: Any) -> update.Addable:
        made = original(*args)
        np.save(path, made.words.view(f"u{made.words.itemsize}"))
        return made

    update.to_words = to_words


if __name__ == "__main__":
    main()
