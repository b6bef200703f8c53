"""A box or a hub that dies at a chosen call (tests/crash.py), as a Daemon of benchmarks.house."""

import sys
from dataclasses import dataclass

from benchmarks.house import Box, Hub
from benchmarks.processes import Daemon

DEATH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Point:
    """Where to die: before or after the nth call of module:name."""

    when: str
    target: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.when}-{self.target}-{self.nth}"


def dying_box(box: Box, point: Point) -> Daemon:
    return _dying(point, ["edge-agent", "run", "--config", str(box.config_path)], box.daemon)


def dying_hub(hub: Hub, point: Point) -> Daemon:
    return _dying(point, ["hub", "run", "--config", str(hub.data_dir / "hub.toml")], hub.daemon)


def _dying(point: Point, command: list[str], like: Daemon) -> Daemon:
    crash = [sys.executable, "-m", "tests.crash", point.when, point.target, str(point.nth), "--"]
    return Daemon([*crash, *command], like.log_path)
