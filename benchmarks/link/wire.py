"""One network namespace for each end, joined by a bridge: what a box sends and receives is counted by the kernel.

Makes and ends namespaces, veth pairs, a bridge and /etc/netns; reads interface counters. Without root: plain loopback.
Never touches what another process made: every name begins with this process's number, and only a dead one's are cleared.
Source: ip-netns(8), veth(4); /sys/class/net/*/statistics.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks.processes import HouseError

PREFIX = "wl"
HUB = "hub"
HUB_NAME = "hubsrv"  # in every namespace's hosts file: NVIDIA FLARE connects by name
_OURS = re.compile(rf"^{PREFIX}(\d+)-")
_HOSTS = Path("/etc/netns")


@dataclass(frozen=True)
class Count:
    """Bytes on the wire, Ethernet headers included, as the end itself sees them."""

    received: int
    sent: int

    def __sub__(self, before: "Count") -> "Count":
        return Count(self.received - before.received, self.sent - before.sent)


class Wire:
    """`with Wire(["box-1", …]) as wire:` the hub and these ends, each in a namespace of its own where that may be made."""

    def __init__(self, ends: Sequence[str]) -> None:
        self.ends = tuple(ends)
        self.is_apart = os.geteuid() == 0 and shutil.which("ip") is not None
        self._mine = f"{PREFIX}{os.getpid()}-"
        self._net = f"10.79.{os.getpid() % 254 + 1}"

    @property
    def says(self) -> str:
        return "a namespace each" if self.is_apart else "loopback, bytes without TLS and MQTT (needs root)"

    @property
    def hub_address(self) -> str:
        return f"{self._net}.1" if self.is_apart else "127.0.0.1"

    @property
    def hub_name(self) -> str:
        return HUB_NAME if self.is_apart else "localhost"

    def inside(self, end: str) -> list[str]:
        """What goes in front of a command that runs at this end."""
        return ["ip", "netns", "exec", self._namespace(end)] if self.is_apart else []

    def count(self, end: str) -> Count | None:
        """None on plain loopback."""
        if not self.is_apart:
            return None
        statistics = Path("/sys/class/net") / self._namespace(end) / "statistics"
        return Count(int((statistics / "tx_bytes").read_text()), int((statistics / "rx_bytes").read_text()))

    def __enter__(self) -> "Wire":
        if self.is_apart:
            _clear_dead()
            try:
                self._make()
            except HouseError:
                self._clear()
                self.is_apart = False  # a container without the right to: loopback
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_apart:
            self._clear()

    def _namespace(self, end: str) -> str:
        """Also the name of the veth's end at the bridge: at most 15 characters."""
        number = 0 if end == HUB else self.ends.index(end) + 1
        return f"{self._mine}{number}"

    def _make(self) -> None:
        bridge = f"{self._mine}br"
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{self._net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number, end in enumerate((HUB, *self.ends), 1):
            name = self._namespace(end)
            (_HOSTS / name).mkdir(parents=True)
            hosts = f"127.0.0.1 localhost\n{self._net}.1 {HUB_NAME}\n"
            (_HOSTS / name / "hosts").write_text(hosts)
            _ip("netns", "add", name)
            _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", name, "master", bridge, "up")
            _ip("-n", name, "addr", "add", f"{self._net}.{number}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _clear(self) -> None:
        _clear(self._mine)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HouseError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _clear_dead() -> None:
    """What a killed bench left."""
    names = {path.name for folder in (_HOSTS, Path("/run/netns")) if folder.is_dir() for path in folder.iterdir()}
    for name in names:
        found = _OURS.match(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            _clear(f"{PREFIX}{found[1]}-")


def _clear(mine: str) -> None:
    for path in Path("/run/netns").glob(f"{mine}*"):
        subprocess.run(["ip", "netns", "del", path.name], capture_output=True, check=False)
    for path in _HOSTS.glob(f"{mine}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in Path("/sys/class/net").glob(f"{mine}*"):  # the bridge; a veth goes with its namespace
        subprocess.run(["ip", "link", "del", path.name], capture_output=True, check=False)
