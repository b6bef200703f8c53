"""Inputs from inputs: bytes turned, cut, repeated and joined, and one value changed inside a MessagePack or JSON tree.

Reads and writes bytes in memory.
Never draws from anything but the generator it is given: the same seed gives the same inputs.
Source: libFuzzer's mutations; structure-aware fuzzing as in its documentation.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

ODD = (0, 1, -1, 127, 255, 256, 65_535, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -(2**63), 0.0, -1.5, 1e308)
ODD_TREES = (None, True, "", "a", "A\n", "é" * 40, b"", b"\x00" * 32, [], {}, [[]], {"": {}}, math.inf, math.nan)


def mutated(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    generator = random.Random(seed)
    for _ in range(count):
        content = generator.choice(seeds)
        for _ in range(generator.randint(1, 3)):
            content = _changed(content, seeds, generator)
        yield content


def in_tree(content: bytes, generator: random.Random) -> bytes | None:
    """One value of the tree is another; None where there is no tree."""
    for codec in (msgspec.msgpack, msgspec.json):
        try:
            return codec.encode(_with_change(codec.decode(content), generator))
        except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError):
            continue
    return None


def _changed(content: bytes, seeds: Sequence[bytes], generator: random.Random) -> bytes:
    if generator.random() < 0.5 and (changed := in_tree(content, generator)) is not None:
        return changed
    at, end = sorted(generator.randint(0, len(content)) for _ in range(2))
    ways: list[Callable[[], bytes]] = [
        lambda: content[:at],
        lambda: content[:at] + content[end:],
        lambda: content[:end] + content[at:],
        lambda: content[:at] + generator.randbytes(generator.randint(1, 8)) + content[at:],
        lambda: content[:at] + generator.choice(seeds)[at:],
        lambda: content[:at] + _turned(content[at : at + 1], generator) + content[at + 1 :],
    ]
    return generator.choice(ways)()


def _turned(one: bytes, generator: random.Random) -> bytes:
    return bytes(byte ^ (1 << generator.randint(0, 7)) for byte in one)


def _with_change(tree: Any, generator: random.Random) -> Any:
    """Goes down until it stops; containers lose, double or change an entry."""
    if isinstance(tree, dict) and tree and generator.random() < 0.9:
        key = generator.choice(list(tree))
        others = {other: value for other, value in tree.items() if other != key}
        if generator.random() < 0.1:
            return others
        return others | {key: _with_change(tree[key], generator)}
    if isinstance(tree, list) and tree and generator.random() < 0.9:
        at = generator.randrange(len(tree))
        if generator.random() < 0.2:
            return generator.choice([tree[:at] + tree[at + 1 :], [*tree, tree[at]], tree[::-1]])
        return [*tree[:at], _with_change(tree[at], generator), *tree[at + 1 :]]
    if isinstance(tree, bytes | str) and tree and generator.random() < 0.7:
        return _changed_text(tree, generator)
    return generator.choice([*ODD, *ODD_TREES])


def _changed_text(text: Any, generator: random.Random) -> Any:
    at = generator.randrange(len(text))
    other = bytes([generator.randrange(256)]) if isinstance(text, bytes) else chr(generator.randrange(0x20, 0x500))
    return generator.choice([text[:at], text + text, text[:at] + other + text[at + 1 :], text + other])
