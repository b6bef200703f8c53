"""The peers' side of the bench: environments of their own, and what their hub and clients cost between two rounds.

Makes .bench/peers/NAME with pip where it is missing; starts and samples processes.
Never installs into this project's environment; where a peer cannot be had, its row says why.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.link import cost
from benchmarks.link.wire import Count, Wire
from benchmarks.processes import Daemon, HouseError

Row = dict[str, Any]

FOLDER = Path(".bench") / "peers"
APPS = Path(__file__).parent / "peer-apps"
PACKAGES = {"flower": ("flwr==1.42.0",), "flare": ("nvflare==2.9.0", "torch==2.13.0")}
SHOWN_AS = {"flower": "Flower 1.42", "flare": "NVIDIA FLARE 2.9"}
INSTALL_TIMEOUT_S, ROUND_TIMEOUT_S = 1800.0, 900.0
EVERY_S = 0.25
_WHOLE = "installed"  # written last


class MissingError(Exception):
    """A peer that is not here and cannot be installed; the text is the row's."""


def environment(peer: str, *, install: bool) -> Path:
    """The folder of its commands. Raises MissingError."""
    folder = (FOLDER / peer).resolve()
    if not (folder / _WHOLE).exists():
        if not install:
            raise MissingError("not installed: run without --quick")
        _install(peer, folder)
    return folder / "bin"


def _install(peer: str, folder: Path) -> None:
    print(f"peers: installing {SHOWN_AS[peer]} into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    command = [str(folder / "bin" / "pip"), "install", "-q", *PACKAGES[peer]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise MissingError(f"pip took longer than {INSTALL_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise MissingError(f"not installable: {complaints[-1][:200]}")
    (folder / _WHOLE).touch()


@dataclass(frozen=True)
class Deployment:
    """A peer's hub and clients while they run."""

    wire: Wire
    hub: Daemon
    clients: dict[str, Daemon]  # by end

    def snapshot(self) -> "Snapshot":
        return Snapshot(
            cost.cpu_s(cost.family(self.hub.pid)),
            sum(cost.cpu_s(cost.family(client.pid)) for client in self.clients.values()),
            {end: count for end in self.clients if (count := self.wire.count(end))},
        )


@dataclass(frozen=True)
class Snapshot:
    hub_cpu_s: float
    box_cpu_s: float
    counts: dict[str, Count]


def between_rounds(deployment: Deployment, rounds: int, done: Callable[[], int], alive: Callable[[], object]) -> Row:
    """Costs of one round: from the end of the first, which warms up, to the end of the last of 1 + `rounds`."""
    peaks: dict[int, int] = {}
    first = _at(deployment, lambda: done() >= 1, peaks, alive)
    last = _at(deployment, lambda: done() >= 1 + rounds, peaks, alive)
    moved = [last.counts[end] - first.counts[end] for end in last.counts]
    return {
        "hub_cpu_s": (last.hub_cpu_s - first.hub_cpu_s) / rounds,
        "box_cpu_s": (last.box_cpu_s - first.box_cpu_s) / rounds / len(deployment.clients),
        "hub_peak_bytes": sum(peaks.values()),
        "up_bytes": int(median(count.sent for count in moved) / rounds) if moved else None,
        "down_bytes": int(median(count.received for count in moved) / rounds) if moved else None,
        "wire": deployment.wire.says,
    }


def _at(
    deployment: Deployment, reached: Callable[[], bool], peaks: dict[int, int], alive: Callable[[], object]
) -> Snapshot:
    deadline = time.monotonic() + ROUND_TIMEOUT_S
    while not reached():
        alive()
        if time.monotonic() > deadline:
            raise HouseError(f"no round within {ROUND_TIMEOUT_S:.0f} s")
        _note_peaks(cost.family(deployment.hub.pid), peaks)
        time.sleep(EVERY_S)
    return deployment.snapshot()


def _note_peaks(pids: Iterable[int], peaks: dict[int, int]) -> None:
    """Of the processes that run now; the others leave, so that only those of one moment are added up."""
    now = {pid: max(peaks.get(pid, 0), cost.peak_bytes(pid)) for pid in pids}
    if sum(now.values()) >= sum(peaks.values()):
        peaks.clear()
        peaks.update(now)


def stop(daemons: Sequence[Daemon], within_s: float = 5.0) -> None:
    """With all that they have started: some of it leads a session of its own."""
    families = [pid for daemon in daemons if daemon.running for pid in cost.family(daemon.pid)]
    for daemon in daemons:
        daemon.stop(within_s)
    for pid in families:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run(command: Sequence[str], cwd: Path, env: dict[str, str], timeout_s: float = 120.0) -> None:
    """Raises HouseError with its last words."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise HouseError(
            f"{Path(command[-1]).name} exited with {done.returncode}:\n{(done.stdout + done.stderr)[-1500:]}"
        )


def lines(path: Path) -> list[str]:
    """Whole lines only."""
    text = path.read_text() if path.exists() else ""
    return text.split("\n")[:-1]


def answers(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((address, port)) == 0
