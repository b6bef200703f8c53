"""The order of the test files: those that take minutes first, so that no core waits for the other at the end.

Reads and writes nothing.
Never changes the order within a file.
Source: pytest, `pytest_collection_modifyitems`; `./dev test` gives each of two processes file after file.
"""

import pytest

LONG = (
    "test_kill_round.py",
    "test_kill_masked.py",
    "test_demo.py",
    "test_site_learning.py",
    "test_kill_box.py",
    "test_parallel.py",
    "test_bench_scale.py",
    "test_kill_buffered.py",
    "test_kill_groups.py",
    "test_masked_groups.py",
    "test_sealed_key.py",
    "test_open_share.py",
    "test_service.py",
    "test_operators.py",
    "test_privacy.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
