"""The bar for people on stderr, the lines for machines on stdout: neither gets into the other."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from models.bundle import SHIPPED
from tests.models.test_training import finetune, write_examples

TOLD = "from models.progress import shown\nwith shown(3, {first}) as told:\n told(1, 0.5)\n told(2, None)\n told(3, 0.25)\n"
LINES = [{"epoch": 1, "loss": 0.5}, {"epoch": 2}, {"epoch": 3, "loss": 0.25}]


def on_terminal(command: list[str], *, stdout_too: bool = False) -> tuple[int, str, str]:
    """Exit status, stdout, and what a terminal on stderr was shown."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    stdout = theirs if stdout_too else subprocess.PIPE
    with subprocess.Popen(command, stdout=stdout, stderr=theirs, env=environment, text=True) as child:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # EIO: nobody holds the other end any more
            pass
        os.close(ours)
        said = child.stdout.read() if child.stdout is not None else ""
    return child.returncode, said, shown.decode()


def telling(first: bool = True) -> list[str]:
    return [sys.executable, "-c", TOLD.format(first=first)]


def parsed(stdout: str) -> list[object]:
    return [json.loads(line) for line in stdout.splitlines()]


def test_somebody_who_watches_sees_a_bar_and_machines_the_same_lines() -> None:
    status, stdout, shown = on_terminal(telling())
    assert status == 0
    assert parsed(stdout) == LINES
    for word in ("epochs", "━", "3/3", "loss 0.2500", "left", "0:00:0"):
        assert word in shown
    assert "{" not in shown


def test_lines_on_the_same_terminal_are_whole() -> None:
    _, _, shown = on_terminal(telling(), stdout_too=True)
    assert "3/3" in shown
    assert shown.count('"epoch"') == 3


def test_without_a_terminal_stderr_stays_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take that for a terminal
    told = subprocess.run(telling(), capture_output=True, text=True, check=True)
    assert parsed(told.stdout) == LINES
    assert told.stderr == ""


def test_of_several_processes_one_shows_a_bar() -> None:
    _, stdout, shown = on_terminal(telling(first=False))
    assert parsed(stdout) == LINES
    assert shown == ""


@pytest.mark.slow
def test_a_training_shows_its_bar_and_an_error_comes_after_it(tmp_path: Path) -> None:
    examples = write_examples(tmp_path / "examples", per_label=2, modalities=("XR",))
    command = [sys.executable, "-m", "models.training", "finetune", "--bundle", str(SHIPPED)]
    command += ["--examples", str(examples), "--epochs", "2"]
    status, stdout, shown = on_terminal([*command, "--out", str(tmp_path / "out")])
    assert status == 0
    assert [line["epoch"] for line in map(json.loads, stdout.splitlines())] == [1, 2]
    assert "2/2" in shown
    assert "loss" in shown
    status, _, shown = on_terminal([*command, "--out", str(tmp_path / "diverged"), "--lr", "1e30"])
    assert status == 1
    error = shown.splitlines()[-1]
    assert "not finite" in json.loads(error[error.index("{") :])["error"]
    quiet = finetune(examples, tmp_path / "quiet", "--epochs", "2")
    assert (quiet.returncode, quiet.stderr) == (0, "")
