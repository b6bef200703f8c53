"""Run one of our commands so that it dies by SIGKILL at a chosen call: a power cut at a hand-over.

    python -m tests.crash before|after MODULE:NAME[.METHOD] NTH -- edge-agent|hub ARGUMENTS…

`before`: the NTH call never happens; `after`: it has happened and nothing after it has. Production code knows nothing of this.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

COMMANDS = {"edge-agent": "edge_agent.cli", "hub": "cloud_hub.cli"}


def main() -> None:
    when, target, nth, _, command, *arguments = sys.argv[1:]
    arm(when, target, int(nth))
    sys.argv = [command, *arguments]
    importlib.import_module(COMMANDS[command]).main()


def arm(when: str, target: str, nth: int) -> None:
    """Replace the attribute; callers must reach it through its module or its class, as ours do."""
    module_name, _, path = target.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, module)
    original = getattr(owner, name)
    setattr(owner, name, deadly(original, when, nth))


def deadly(original: Callable[..., Any], when: str, nth: int) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if calls == nth and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    return call


if __name__ == "__main__":
    main()
