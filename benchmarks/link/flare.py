"""NVIDIA FLARE's provisioned deployment with mutual TLS: a server, a client in each namespace, FedAvg with a dummy trainer.

Starts the startup kits that `nvflare provision` makes; reads the log of the server's job.
Never measures the first round: it loads the job. A round is from its start to the next one's, as the server logs them.
Source: NVIDIA FLARE 2.9, "Provisioning"; numpy exchange format.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.link import peers
from benchmarks.link.peers import Deployment, Row
from benchmarks.link.wire import HUB, Wire
from benchmarks.processes import Daemon, wait_for

LEARN_PORT, ADMIN_PORT = 8102, 8103
READY_TIMEOUT_S = 90.0
SETTLE_S = 12.0  # until the clients are registered
ADMIN = "admin@bench.com"
KITS = "kits/bench/prod_00"
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}")
_STARTED = re.compile(r"\s*Round \d+ started\.")
_PARTICIPANTS = """api_version: 3
name: bench
description: bench
participants:
  - {{name: {server}, type: server, org: b, fed_learn_port: {learn}, admin_port: {admin_port}}}
  - {{name: {admin}, type: admin, org: b, role: project_admin}}
"""


def measured(bin_: Path, clients: int, parameters: int, rounds: int, work: Path) -> Row:
    """Median of the rounds. Raises HouseError."""
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="flare-", dir=work.resolve()))
    try:
        with _deployed(bin_, folder, [f"site-{number}" for number in range(1, clients + 1)]) as deployment:
            starts = Starts(folder / KITS / deployment.wire.hub_name)
            # One that warms up, and one more, whose start is the last one's end.
            submitted = _submit(bin_, deployment, folder, parameters, rounds + 2)
            try:
                done = peers.between_rounds(deployment, rounds, lambda: starts.count() - 1, submitted.must_run)
            finally:
                submitted.stop(2.0)
        seconds = [(after - before).total_seconds() for before, after in pairwise(starts.at[1 : rounds + 2])]
        return done | {"round_s": median(seconds), "rounds_s": seconds}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Starts:
    """When each round began; the job's log goes with the job, so what was read stays here."""

    def __init__(self, server: Path) -> None:
        self.at: list[datetime] = []
        self._server = server

    def count(self) -> int:
        for log in self._server.glob("*/log.txt"):
            started = _starts(peers.lines(log))
            if len(started) > len(self.at):
                self.at = started
        return len(self.at)


def _starts(lines: list[str]) -> list[datetime]:
    """A start is told in the middle of a message of several lines; its time stands on the first."""
    started, at = [], None
    for line in lines:
        if stamp := _TIME.match(line):
            at = datetime.strptime(stamp[0], "%Y-%m-%d %H:%M:%S,%f")
        elif at is not None and _STARTED.match(line):
            started.append(at)
    return started


@contextmanager
def _deployed(bin_: Path, folder: Path, ends: list[str]) -> Iterator[Deployment]:
    with Wire(ends) as wire:
        kits = _provisioned(bin_, folder, wire)
        environment = _environment(bin_, folder)
        hub = _kit(kits / wire.hub_name, wire.inside(HUB), folder)
        sites = {end: _kit(kits / end, wire.inside(end), folder) for end in ends}
        try:
            hub.start(environment)
            wait_for(
                "answer from the server", lambda: peers.answers(wire.hub_address, LEARN_PORT), timeout_s=READY_TIMEOUT_S
            )
            for site in sites.values():
                site.start(environment)
            time.sleep(SETTLE_S)
            yield Deployment(wire, hub, sites)
        finally:
            peers.stop([*sites.values(), hub])


def _kit(kit: Path, inside: list[str], folder: Path) -> Daemon:
    """start.sh leaves what it has started in the background: a shell that waits keeps the session's leader alive."""
    command = f"cd {kit} && ./startup/start.sh; exec sleep infinity"
    return Daemon([*inside, "bash", "-c", command], folder / f"{kit.name}.log")


def _provisioned(bin_: Path, folder: Path, wire: Wire) -> Path:
    environment = _environment(bin_, folder)
    peers.run([str(bin_ / "nvflare"), "provision", "-g"], folder, environment)
    sample = (folder / "project.yml").read_text()
    text = _PARTICIPANTS.format(server=wire.hub_name, learn=LEARN_PORT, admin_port=ADMIN_PORT, admin=ADMIN)
    text += "".join(f"  - {{name: {end}, type: client, org: b}}\n" for end in wire.ends)
    (folder / "bench.yml").write_text(text + sample[sample.index("builders:") :])
    peers.run([str(bin_ / "nvflare"), "provision", "-p", "bench.yml", "-w", "kits", "--force"], folder, environment)
    return folder / KITS


def _submit(bin_: Path, deployment: Deployment, folder: Path, parameters: int, rounds: int) -> Daemon:
    """What waits for the job's end."""
    app, jobs, environment = folder / "app", folder / "jobs", _environment(bin_, folder)
    shutil.copytree(peers.APPS / "flare", app)
    model = (app / "model.py").read_text().replace("PARAMETERS = 5_000_000", f"PARAMETERS = {parameters}")
    (app / "model.py").write_text(model)
    python = str(bin_ / "python")
    peers.run([python, "job.py", str(len(deployment.clients)), str(rounds), str(jobs)], app, environment)
    kits = folder / KITS
    command = [
        *deployment.wire.inside(HUB),
        python,
        "-u",
        str(app / "submit.py"),
        str(kits / ADMIN),
        str(jobs / "flbench"),
    ]
    waiting = Daemon(command, folder / "submit.log")
    waiting.start(environment)
    return waiting


def _environment(bin_: Path, folder: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "HOME": str(folder)}
