"""Every parser that reads the wire takes what is valid, and refuses a few hundred changes of it with its own errors."""

import logging
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.fuzz import all_targets, mutators

MUTATIONS = 300
SEED = 20261130


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Refusals are logged; here they are the rule."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", all_targets.names())
def test_only_documented_errors_come_out(name: str) -> None:
    target = all_targets.of_name(name)
    assert all(target.accepts(seed) for seed in target.seeds), "the fuzzer starts from what is valid"
    assert not any(target.accepts(seed) for seed in target.refused)
    starts = (*target.seeds, *target.refused)
    accepted = [target.accepts(content) for content in mutators.mutated(starts, MUTATIONS, SEED)]
    assert not all(accepted), "nothing was refused"


def test_the_same_seed_gives_the_same_inputs() -> None:
    seeds = all_targets.of_name("topic").seeds
    first, again = (list(mutators.mutated(seeds, 50, SEED)) for _ in range(2))
    assert first == again
    assert first != list(mutators.mutated(seeds, 50, SEED + 1))


def test_a_value_inside_a_message_is_changed_and_the_rest_stays() -> None:
    [seed, *_] = all_targets.of_name("messages").seeds
    changed = [mutators.in_tree(seed, random.Random(number)) for number in range(40)]
    before = msgspec.msgpack.decode(seed)
    trees = [msgspec.msgpack.decode(content) for content in changed if content]
    one_key = [sum(tree.get(key) != before[key] for key in before) for tree in trees if isinstance(tree, dict)]
    assert one_key.count(1) > 20


def test_another_error_is_a_finding() -> None:
    target = all_targets.of_name(all_targets.PLANTED)
    with pytest.raises(KeyError):
        all(target.accepts(content) or True for content in mutators.mutated(target.seeds, 20_000, SEED))


def fuzz(name: str, findings: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("atheris", reason="the coverage-guided fuzzer has wheels for Linux on x86-64 alone")
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--seconds", "0", "--runs", "20000"]
    return subprocess.run([*command, "--findings", str(findings)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_fuzzer_runs_and_counts(tmp_path: Path) -> None:
    done = fuzz("delta", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings in: none" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_fuzzer_tells_a_finding_and_keeps_its_input(tmp_path: Path) -> None:
    done = fuzz(all_targets.PLANTED, tmp_path)
    assert done.returncode == 1
    assert "KeyError" in done.stdout
    [kept] = tmp_path.iterdir()
    with pytest.raises(KeyError):
        all_targets.of_name(all_targets.PLANTED).accepts(kept.read_bytes())
