"""Mosquitto as the hub's child: configured, started, watched, restarted, ended with us.

Writes mosquitto.conf, mosquitto.pid and mosquitto.log in data_dir/broker; reads the log for refused connections.
Never trusted: it carries signed and sealed bytes, and nothing relies on what it remembers.
Source: mosquitto.conf(5) 2.0; prctl(2) PR_SET_PDEATHSIG through setpriv(1).
"""

import logging
import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cloud_hub.child import dies_with_us
from cloud_hub.config import Config
from fleet_link.errors import SiteError
from fleet_link.files import write_durably

log = logging.getLogger(__name__)

MESSAGE_BYTES_MAX = 128 * 1024  # a chunk of 120 KiB and its header; managed brokers cap here too; more is refused
PACKET_BYTES_MAX = 256 * 1024  # a packet over this ends the connection before memory is taken for it
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.2, 30.0
STARTED_WITHIN_S = 15.0
STOPPED_WITHIN_S = 5.0
ACCESS_AGE_MAX_S = 86_400.0  # the revocation list is re-issued daily
LOG_BYTES_MAX = 4 * 1024 * 1024
_RUNNING = re.compile(rb"mosquitto version \S+ running")
_TLS_REFUSED = re.compile(r"OpenSSL Error\[\d+\]: (.*)|Client connection from \S+ failed: (.*)")
_BROKEN_OFF = ("unexpected eof while reading",)  # a box that lost power or network refuses nobody
_MQTT_REFUSED = re.compile(
    r"Client (?!<unknown>)(\S+) disconnected[:,] (not authorised|Protocol error|.*oversize.*)", re.I
)


def configuration(config: Config) -> str:
    """The text of mosquitto.conf."""
    paths = config.paths
    lines = [
        "per_listener_settings false",
        f"user {pwd.getpwuid(os.geteuid()).pw_name}",  # as root Mosquitto would become a user that cannot read keys/
        "persistence false",
        "retain_available false",
        f"memory_limit {config.broker.memory_bytes_max}",
        "sys_interval 0",
        "set_tcp_nodelay true",
        f"message_size_limit {MESSAGE_BYTES_MAX}",
        f"max_packet_size {PACKET_BYTES_MAX}",
        "max_inflight_messages 100",
        "max_queued_messages 1000",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",
        f"acl_file {paths.broker / 'acl'}",
        f"listener {config.broker.port} {config.broker.bind}",
        f"max_connections {config.broker.connections_max}",
        "allow_anonymous false",
        f"cafile {paths.ca_certificate}",
        f"certfile {paths.server_certificate}",
        f"keyfile {paths.server_key}",
        f"crlfile {paths.crl}",
        "tls_version tlsv1.3",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
    ]
    return "\n".join(lines) + "\n"


class Broker:
    """`start`, then `watch` every second or so from a thread that lives as long as the process, then `stop`.

    The kernel ends the child when the thread that started it ends: a killed hub leaves no broker behind.
    """

    def __init__(
        self,
        config: Config,
        *,
        write_access: Callable[[], None],
        on_refused: Callable[[str], None],
    ) -> None:
        self._config = config
        self._folder = config.paths.broker
        self._write_access = write_access  # writes acl and crl.pem from the registry
        self._on_refused = on_refused  # the reason of a refused connection, from the log
        self._access_lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._log_offset = 0
        self._access_written_at = 0.0
        self._started_at = 0.0
        self._backoff_s = BACKOFF_MIN_S
        self._restart_at: float | None = None
        self.restarts = 0

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Gives back when Mosquitto listens. Raises SiteError with its own words when it does not."""
        end_stale(self._folder)
        write_durably(self._folder / "mosquitto.conf", configuration(self._config).encode(), mode=0o600)
        self._refresh_access()
        self._spawn()
        self._await_listening()
        log.info("broker runs on port %d", self._config.broker.port)

    def watch(self) -> None:
        """Restart Mosquitto if it died, report refused connections, re-issue the revocation list when due."""
        self._report_refused()
        if self._child is None:
            return
        if self.running:
            age_s = time.time() - self._access_written_at
            if not 0.0 <= age_s <= ACCESS_AGE_MAX_S:  # a list from before the clock went back may not be valid yet
                self.reload()
            return
        now = time.monotonic()
        if self._restart_at is None:
            self._plan_restart(now)
        elif now >= self._restart_at:
            self._restart_at = None
            self.restarts += 1
            self._spawn()
            log.info("broker restarted")

    def reload(self) -> None:
        """Bring the registry's word, and the server's certificate, to the broker: files first, then SIGHUP.

        Safe from any thread.
        """
        self._refresh_access()
        child = self._child
        if child is not None and child.poll() is None:
            child.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.terminate()
        try:
            child.wait(STOPPED_WITHIN_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        (self._folder / "mosquitto.pid").unlink(missing_ok=True)
        log.info("broker stopped")

    def _refresh_access(self) -> None:
        with self._access_lock:
            self._write_access()
            self._access_written_at = time.time()

    def _spawn(self) -> None:
        program = _program(self._config.broker.program)
        command = dies_with_us([program, "-c", str(self._folder / "mosquitto.conf")])
        with (self._folder / "mosquitto.log").open("wb") as log_file:
            self._log_offset = 0
            append = os.open(log_file.name, os.O_WRONLY | os.O_APPEND)
            try:
                self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=append, stderr=append)
            finally:
                os.close(append)
        write_durably(self._folder / "mosquitto.pid", str(self._child.pid).encode(), mode=0o644)
        self._started_at = time.monotonic()

    def _await_listening(self) -> None:
        until = time.monotonic() + STARTED_WITHIN_S
        while not _RUNNING.search(self._log_bytes()):
            if not self.running or time.monotonic() > until:
                words = self._log_bytes().decode("utf-8", "replace").strip().splitlines()[-3:]
                self.stop()
                raise SiteError(
                    f"the broker does not start: {' / '.join(words) or 'no answer'}",
                    advice=f"is port {self._config.broker.port} free? see {self._folder / 'mosquitto.log'}",
                )
            time.sleep(0.02)

    def _plan_restart(self, now: float) -> None:
        if now - self._started_at > BACKOFF_MAX_S:
            self._backoff_s = BACKOFF_MIN_S
        last = self._log_bytes().decode("utf-8", "replace").strip().splitlines()[-1:]
        log.warning("broker ended by itself (%s); restart in %.1f s", " ".join(last), self._backoff_s)
        self._restart_at = now + self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)

    def _log_bytes(self) -> bytes:
        try:
            return (self._folder / "mosquitto.log").read_bytes()
        except FileNotFoundError:
            return b""

    def _report_refused(self) -> None:
        for line in self._new_log_lines():
            reason = refused_connection(line)
            if reason:
                self._on_refused(reason)

    def _new_log_lines(self) -> Iterator[str]:
        path = self._folder / "mosquitto.log"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._log_offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._log_offset += len(whole) + len(newline)
        if self._log_offset > LOG_BYTES_MAX:
            os.truncate(path, 0)  # Mosquitto appends, so it goes on at the new end
            self._log_offset = 0
        yield from whole.decode("utf-8", "replace").splitlines()


def refused_connection(line: str) -> str | None:
    """The reason in a line of Mosquitto's log that tells of a refused connection."""
    tls = _TLS_REFUSED.search(line)
    if tls is not None:
        reason = (tls[1] or tls[2]).rpartition(":")[2].strip(" .")  # error:0A000086:SSL routines::REASON
        return None if reason in _BROKEN_OFF else reason
    mqtt = _MQTT_REFUSED.search(line)
    return f"{mqtt[1]}: {mqtt[2].strip(' .')}" if mqtt else None


def end_stale(folder: Path) -> None:
    """End the broker that an earlier hub left behind, if the pid still is that broker."""
    path = folder / "mosquitto.pid"
    try:
        pid = int(path.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, ValueError):
        path.unlink(missing_ok=True)
        return
    if os.fsencode(folder / "mosquitto.conf") in command:
        log.warning("ending a broker that an earlier hub left behind")
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists() and b"mosquitto" in _cmdline(pid):
            time.sleep(0.01)
    path.unlink(missing_ok=True)


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise SiteError(f"broker.program: {name} is not installed", advice="apt-get install mosquitto")
    return found
