"""Flower's deployment over TLS: a SuperLink, a SuperNode in each namespace, FedAvg with a dummy trainer.

Starts the installed commands of .bench/peers/flower; reads the log that the server app writes.
Never measures the first round: it loads the apps.
Source: Flower 1.42, "Enable TLS connections"; clients are not authenticated, which is its default.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from benchmarks.link import peers
from benchmarks.link.peers import Deployment, Row
from benchmarks.link.wire import HUB, Wire
from benchmarks.processes import Daemon, HouseError, free_port, wait_for
from cloud_hub import ca

PORT = 8443
READY_TIMEOUT_S = 60.0
SETTLE_S = 8.0  # until the SuperNodes are known


def measured(bin_: Path, clients: int, parameters: int, rounds: int, work: Path) -> Row:
    """Median of the rounds, each from making the messages to the aggregated weights. Raises HouseError."""
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="flower-", dir=work.resolve()))
    log = folder / "rounds.jsonl"
    try:
        with _deployed(bin_, folder, [f"box-{number}" for number in range(1, clients + 1)]) as deployment:
            _submit(
                bin_, deployment, folder, {"num-server-rounds": 1 + rounds, "params": parameters, "clients": clients}
            )
            done = peers.between_rounds(deployment, rounds, lambda: len(peers.lines(log)), deployment.hub.must_run)
        told = [json.loads(line) for line in peers.lines(log)][1:]
        if any(row["replies"] != clients for row in told):
            raise HouseError(f"not every client answered: {told}")
        seconds = [row["round_s"] for row in told]
        return done | {"round_s": median(seconds), "rounds_s": seconds}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _deployed(bin_: Path, folder: Path, ends: list[str]) -> Iterator[Deployment]:
    with Wire(ends) as wire:
        _write_tls(folder, wire.hub_address)
        hub = Daemon(_superlink(bin_, folder, wire), folder / "superlink.log")
        nodes = {end: Daemon(_supernode(bin_, folder, wire, end), folder / f"{end}.log") for end in ends}
        try:
            hub.start(_environment(bin_, folder / "hub"))
            wait_for("answer from the SuperLink", lambda: _listens(hub, wire), timeout_s=READY_TIMEOUT_S)
            for end, node in nodes.items():
                node.start(_environment(bin_, folder / end))
            time.sleep(SETTLE_S)
            yield Deployment(wire, hub, nodes)
        finally:
            peers.stop([*nodes.values(), hub])


def _superlink(bin_: Path, folder: Path, wire: Wire) -> list[str]:
    tls = ["--ssl-certfile", "hub.pem", "--ssl-keyfile", "hub.key", "--ssl-ca-certfile", "ca.pem"]
    tls = [str(folder / word) if word.endswith((".pem", ".key")) else word for word in tls]
    command = [*wire.inside(HUB), str(bin_ / "flower-superlink"), "--host", wire.hub_address, "--port", str(PORT)]
    return [*command, *tls, "--disable-runtime-dependency-installation"]


def _supernode(bin_: Path, folder: Path, wire: Wire, end: str) -> list[str]:
    command = [*wire.inside(end), str(bin_ / "flower-supernode"), "--superlink", f"{wire.hub_address}:{PORT}"]
    return [*command, "--root-certificates", str(folder / "ca.pem"), "--port", str(free_port())]


def _submit(bin_: Path, deployment: Deployment, folder: Path, wish: dict[str, int]) -> None:
    home, app = folder / "operator", folder / "app"
    home.mkdir()
    link = f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{deployment.wire.hub_address}:{PORT}"\n'
    (home / "config.toml").write_text(f'{link}root-certificates = "{folder / "ca.pem"}"\n')
    shutil.copytree(peers.APPS / "flower", app)
    settings = " ".join(f"{name}={value}" for name, value in wish.items()) + f' log="{folder / "rounds.jsonl"}"'
    peers.run([str(bin_ / "flwr"), "run", ".", "bench", "-c", settings], app, _environment(bin_, home))


def _environment(bin_: Path, home: Path) -> dict[str, str]:
    path = f"{bin_}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}


def _listens(hub: Daemon, wire: Wire) -> bool:
    hub.must_run()
    return peers.answers(wire.hub_address, PORT)


def _write_tls(folder: Path, address: str) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), time.time()
    authority = ca.create(ec.generate_private_key(ec.SECP256R1()), name="bench", now=now)
    certificate = authority.issue_server(key.public_key(), [address, "localhost", "127.0.0.1"], days=1, now=now)
    (folder / "ca.pem").write_bytes(authority.pem)
    (folder / "hub.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "hub.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
