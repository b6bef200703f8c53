"""What processes cost: processor seconds and the largest resident memory, from proc(5).

Reads /proc; resets a process's high-water mark through clear_refs.
Never counts a process twice: the children of a live one count once they have ended.
Source: proc(5): stat, status, clear_refs.
"""

import os
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_FORGET_PEAK = "5"


def cpu_s(pids: Iterable[int]) -> float:
    """User and system seconds of these processes and of their children that have ended. A dead process is 0."""
    return sum(sum(int(field) for field in _stat(pid)[11:15]) for pid in pids) / _TICKS


def own_cpu_s(pid: int) -> float:
    """Without children."""
    return sum(int(field) for field in _stat(pid)[11:13]) / _TICKS


def peak_bytes(pid: int) -> int:
    """VmHWM; 0 once the process is gone."""
    return _memory(pid, "VmHWM")


def resident_bytes(pid: int) -> int:
    return _memory(pid, "VmRSS")


def forget_peak(pid: int) -> None:
    """The high-water mark begins anew at what is resident now."""
    Path(f"/proc/{pid}/clear_refs").write_text(_FORGET_PEAK)


def family(leader: int) -> list[int]:
    """Every process of the session that this one leads, and whatever they have started, in sessions of their own too."""
    stats = {int(path.name): _stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found = {pid for pid, stat in stats.items() if stat and (pid == leader or int(stat[3]) == leader)}
    while more := {pid for pid, stat in stats.items() if stat and int(stat[1]) in found} - found:
        found |= more
    return sorted(found)


def _stat(pid: int) -> list[str]:
    """The fields after the command's name: state is 0."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _memory(pid: int, field: str) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)), 0)
