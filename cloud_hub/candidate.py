"""From mean delta to candidate bundle: a child process exports, compares with torch and recomputes the known answer.

Reads the base bundle; writes one folder of its own inside the round's folder and gives the bundle in it.
Never imports torch; a child that hangs, is killed or dies with the hub costs one more export, nothing else.
Source: ARCHITECTURE.md, "Releases": export parity with torch.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_hub.child import dies_with_us
from fleet_link import files
from fleet_link.errors import SiteError, WardroundError
from models import weights_file
from models.bundle import read_bundle, read_manifest
from models.errors import ModelError

log = logging.getLogger(__name__)

EXPORT = (sys.executable, "-m", "models.export")
PREFIX = "export-"
STOPPED_WITHIN_S = 5.0
SHOWN_CHARACTERS = 400


class CandidateError(WardroundError):
    """No bundle came out; the round is dropped with this reason."""


@dataclass(frozen=True)
class Order:
    """What to make. `folder` is the round's own."""

    folder: Path
    base: Path
    version: str
    timeout_s: float
    command: tuple[str, ...] = EXPORT


class Export:
    """One running child. `poll` until it gives the bundle, or `stop`."""

    def __init__(
        self,
        order: Order,
        mean: Mapping[str, NDArray[np.float32]],
        *,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises CandidateError when the mean does not fit the base; SiteError or OSError for what may be over in a moment.

        `seconds`: of a clock that nobody sets.
        """
        self._order = order
        self._seconds = seconds
        self._started_at = seconds()
        self._work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=order.folder))
        self._bundle = self._work / "candidate.bundle"
        weights = self._work / "weights.safetensors"
        try:
            name = read_manifest(order.base).name
            weights_file.write_moved(order.base, mean, weights)
        except ModelError as error:
            if files.may_be_over(error.__cause__):
                raise SiteError(str(error), advice="check the hub's disk and limits") from error
            raise CandidateError(str(error), advice=error.advice) from error
        arguments = ["--bundle", order.base, "--weights", weights, "--out", self._bundle]
        arguments += ["--name", name, "--version", order.version]
        self._child = self._spawn([*order.command, *map(str, arguments)])
        log.info("candidate %s: export started", order.version)

    def poll(self) -> Path | None:
        """The finished bundle, None while the child runs. Raises CandidateError with the child's own words."""
        code = self._child.poll()
        if code is None:
            if self._seconds() - self._started_at > self._order.timeout_s:
                self.stop()
                raise CandidateError(
                    f"export took longer than {self._order.timeout_s:.0f} s", advice="raise rounds.export_timeout_s"
                )
            return None
        if code != 0:
            raise CandidateError(f"export failed: {self._reason(code)}", advice="the round is dropped; start another")
        self._check()
        return self._bundle

    def stop(self) -> None:
        """End the child if it runs. What it wrote goes with `clear`."""
        self._child.terminate()
        try:
            self._child.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _spawn(self, command: list[str]) -> "subprocess.Popen[bytes]":
        with (self._work / "out").open("wb") as out, (self._work / "err").open("wb") as err:
            return subprocess.Popen(
                dies_with_us(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # Ctrl-C at the hub is the hub's to handle
                cwd=self._work,
            )

    def _reason(self, code: int) -> str:
        if code < 0:
            return f"ended by signal {-code}"
        lines = (self._work / "err").read_bytes().decode(errors="replace").strip().splitlines() or [""]
        try:
            said: Any = msgspec.json.decode(lines[-1].encode())
            return str(said["error"])[:SHOWN_CHARACTERS]
        except (msgspec.DecodeError, KeyError, TypeError):
            return f"exit code {code}: {lines[-1][:SHOWN_CHARACTERS]}"

    def _check(self) -> None:
        """The child's word is not taken for it: the file is read with every rule of the format."""
        try:
            bundle = read_bundle(self._bundle)
            said = msgspec.json.decode((self._work / "out").read_bytes(), type=_Report)
        except ModelError as error:
            raise CandidateError(f"export gave no bundle: {error}", advice=error.advice) from error
        except msgspec.DecodeError as error:
            raise CandidateError(f"export gave no report: {error}", advice="see the hub's log") from error
        if said.digest != bundle.digest:
            raise CandidateError("the exported bundle is not the one reported", advice="check the hub's disk")
        log.info("candidate %s: exported, parity %.2g", self._order.version, said.parity)


class _Report(msgspec.Struct, frozen=True):
    digest: str
    parity: float


def clear(folder: Path) -> None:
    """Remove what exports left in a round's folder."""
    for leftover in folder.glob(PREFIX + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
