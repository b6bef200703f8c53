"""Run one of our commands so that it dies by SIGKILL at a chosen call: a power cut at a hand-over.

    python -m tests.crash before|after MODULE:NAME[.METHOD] NTH GIVEN -- edge-agent|hub ARGUMENTS…

`before`: the NTH call never happens; `after`: it has happened and nothing after it has. Where GIVEN is not empty, only calls
count that have this text, or a value of a class of this name, among their arguments. Production code knows nothing of this.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

COMMANDS = {"edge-agent": "edge_agent.cli", "hub": "cloud_hub.cli", "plain-words": "tests.plain_words"}


def main() -> None:
    when, target, nth, given, _, command, *arguments = sys.argv[1:]
    arm(when, target, int(nth), given)
    sys.argv = [command, *arguments]
    importlib.import_module(COMMANDS[command]).main()


def arm(when: str, target: str, nth: int, given: str = "") -> None:
    """Replace the attribute; callers must reach it through its module or its class, as ours do."""
    module_name, _, path = target.partition(":")
    module = importlib.import_module(module_name)
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, module)
    original = getattr(owner, name)
    setattr(owner, name, deadly(original, when, nth, given))


def deadly(original: Callable[..., Any], when: str, nth: int, given: str) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if given and not _is_among(given, (*args, *kwargs.values())):
            return original(*args, **kwargs)
        calls += 1
        if calls == nth and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if calls == nth and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    return call


def _is_among(given: str, values: tuple[Any, ...]) -> bool:
    return any((isinstance(value, str) and value == given) or type(value).__name__ == given for value in values)


if __name__ == "__main__":
    main()
