"""What is fuzzed: a parser of bytes that strangers send, valid inputs to start from, the errors it documents.

Reads and writes nothing.
Never lets another exception pass: it is a finding.
Source: libFuzzer's fuzz target; ARCHITECTURE.md, "The link".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Target:
    """`run` parses and checks what it got; the fuzzer starts from `seeds`, which it accepts, and `refused`."""

    name: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    errors: tuple[type[Exception], ...]
    refused: tuple[bytes, ...] = ()

    def accepts(self, content: bytes) -> bool:
        """False where it is refused with a documented error; anything else that is raised is a finding."""
        try:
            self.run(content)
        except self.errors:
            return False
        return True


PLANTED = "planted"  # a careless parser, for the test of the fuzzer itself
Maker = Callable[[], Target]
_makers: dict[str, Maker] = {}


def target(name: str) -> Callable[[Maker], Maker]:
    """Register a function that makes the target: it is called for the one that is run."""

    def register(make: Maker) -> Maker:
        made = cache(make)
        _makers[name] = made
        return made

    return register


def names() -> list[str]:
    """Without the planted one."""
    return sorted(name for name in _makers if name != PLANTED)


def of_name(name: str) -> Target:
    return _makers[name]()
