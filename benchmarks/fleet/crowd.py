"""Many boxes on one hub: certificates made in bulk, and a few processes that hold all connections.

Writes the hub's registry before the hub starts, and a folder of identities; starts `benchmarks.fleet.boxes`.
Never enrols over HTTPS: keys, certificates and rows are those of an enrolment, without its requests.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.fleet.boxes import ADDRESS, AUTHORITIES, GO
from benchmarks.processes import Daemon, wait_for
from cloud_hub import ca, config, database, registry
from cloud_hub.ca import Authority, public_key_sha256
from cloud_hub.config import Config
from cloud_hub.database import Certificate
from fleet_link import pki

ROOT = Path(__file__).parents[2]
SITE = "bench"
READY_TIMEOUT_S = 180.0


class Crowd:
    """`make` before the hub starts, `launch`, `go`, then look at `status`; `stop` in the end."""

    def __init__(self, folder: Path, names: Sequence[str], processes: int) -> None:
        self.folder = folder
        self.names = tuple(names)
        self._groups = [self.names[number::processes] for number in range(processes)]
        self.daemons = [
            Daemon(
                [sys.executable, "-m", "benchmarks.fleet.boxes", str(folder), *group], folder / f"boxes-{number}.log"
            )
            for number, group in enumerate(self._groups)
        ]

    def make(self, hub_toml: Path) -> float:
        """Seconds that keys, certificates and rows took."""
        begin = time.perf_counter()
        self.folder.mkdir(parents=True)
        settings = config.load(hub_toml)
        authority = ca.load(settings.paths.ca_key, settings.paths.ca_certificate, settings.ca_passphrase)
        hub = database.connect(settings.paths.database)
        try:
            with hub.writing() as session:
                registry.add_site(session, SITE, now=time.time())
                for name in self.names:
                    registry.add_device(session, name, SITE, now=time.time())
                    session.add(self._certified(authority, settings, name))
        finally:
            hub.close()
        (self.folder / AUTHORITIES).write_bytes(authority.pem)
        (self.folder / ADDRESS).write_text(json.dumps(["localhost", settings.broker.port]))
        return time.perf_counter() - begin

    def launch(self) -> None:
        """All identities loaded, no connection made."""
        for daemon in self.daemons:
            daemon.start(os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        wait_for("box processes", self._are_loaded, timeout_s=READY_TIMEOUT_S)

    def go(self) -> None:
        (self.folder / GO).touch()

    @property
    def connected(self) -> int:
        return sum(int(each["connected"]) for each in self._said())

    @property
    def states(self) -> Counter[str]:
        """How many boxes stand where in their rounds."""
        return sum((Counter(each["states"]) for each in self._said()), Counter())

    def must_run(self) -> None:
        for daemon in self.daemons:
            daemon.must_run()

    def stop(self) -> None:
        for daemon in self.daemons:
            daemon.stop(1.0)

    def _certified(self, authority: Authority, settings: Config, name: str) -> Certificate:
        key = pki.new_private_key(self.folder / f"{name}.key")
        public_key = key.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        made = authority.issue_device(public_key, name, days=settings.certificates.device_days, now=time.time())
        chain = authority.chain_pem(made)
        (self.folder / f"{name}.pem").write_bytes(chain)
        return Certificate(
            serial=pki.serial_hex(made),
            device=name,
            public_key_sha256=public_key_sha256(public_key),
            not_after=made.not_valid_after_utc.timestamp(),
            pem=pki.pem([made]).decode(),
        )

    def _are_loaded(self) -> bool:
        self.must_run()
        return all((self.folder / f"{group[0]}.json").exists() for group in self._groups)

    def _said(self) -> list[dict[str, Any]]:
        self.must_run()
        return [json.loads((self.folder / f"{group[0]}.json").read_text()) for group in self._groups]
