"""The hub as one process: Mosquitto as its child, HTTPS in a thread, everything else in one loop.

Reads hub.toml's values and the data directory; starts threads and children, handles signals, repairs before any port opens.
Never decides anything itself: it starts drivers and calls them in turn.
Source: systemd's sd_notify(3); ARCHITECTURE.md, "The house".
"""

import fcntl
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import uvicorn

from cloud_hub import ca, cutoff, database, https, memory, registry, setup
from cloud_hub.api import create_app
from cloud_hub.broker import Broker
from cloud_hub.ca import Authority
from cloud_hub.collection import Vault
from cloud_hub.config import Config
from cloud_hub.context import Context
from cloud_hub.coordinator import Coordinator
from cloud_hub.database import Database
from cloud_hub.distribution import Distribution
from cloud_hub.intake import Intake
from cloud_hub.link import Link, Parts, open_bus
from cloud_hub.releases import Repository
from cloud_hub.strangers import TELL_S, Strangers
from fleet_link import files, notify, pki, sealing
from fleet_link.errors import SiteError, WardroundError
from fleet_link.pki import load_identity

log = logging.getLogger(__name__)

WATCH_S = 1.0
REFRESH_S = 3600.0
RENEW_S = 86_400.0
LOOK_S = 1.0  # at a round, for what time alone makes of it; what boxes bring moves it at once
PAUSE_S = 1.0  # after a link that failed at once: the loop does not spin
RETRY_S = 60.0
TOLD_AGAIN_S = 3600.0
HTTPS_STOP_S = 10.0
HTTPS_CONNECTIONS_MAX = 256
WATCHDOG_S = 10.0
SWITCH_S = 0.0005  # between threads: with Python's 5 ms the bus waits that long for each packet while the loop works


def run(config: Config) -> None:
    """Run until SIGTERM or SIGINT. Raises SiteError when the hub cannot start."""
    stop = threading.Event()
    sys.setswitchinterval(SWITCH_S)
    memory.keep_freed()
    with ExitStack() as stack:
        stack.enter_context(_signals(stop))
        stack.enter_context(_only_one(config))
        # 1. What is on disk.
        files.remove_unfinished(config.paths.data_dir)
        authority = ca.load(config.paths.ca_key, config.paths.ca_certificate, config.ca_passphrase)
        if not pki.is_encrypted(config.paths.ca_key):
            log.warning("ca.key is not encrypted: whoever has a backup of it is the hub (hub encrypt-ca)")
        setup.renew_own_certificates(config, authority, now=time.time())
        hub = database.connect(config.paths.database)
        stack.callback(hub.close)
        repository = Repository(config.paths)
        trust = authority.trust  # it takes up a new intermediate with it
        # 2. Half-done work, before any port opens.
        repository.renew(time.time())
        vault = Vault(sealing.load_sealing_key(config.paths.sealing_key), trust, config.rounds.examples_cap)
        intake = Intake(config, hub, repository, vault)
        coordinator = Coordinator(config, hub, repository, intake, look_s=LOOK_S)
        coordinator.start(time.time())
        stack.callback(coordinator.stop)
        # 3. Ports: broker, our own connection to it, HTTPS.
        strangers = Strangers(hub, clock=time.time, seconds=time.monotonic)
        broker = _broker(config, hub, authority, strangers)
        broker.start()
        stack.callback(broker.stop)
        bus = open_bus(config)
        bus.start()
        stack.callback(bus.stop)
        identity = load_identity(config.paths.hub_key, config.paths.hub_certificate)
        distribution = Distribution(config, hub)
        link = Link(Parts(config, hub, bus, identity, trust, intake, distribution, repository, time.time))
        stack.callback(link.close)
        tls = stack.enter_context(_https(config, hub, authority, broker, strangers))
        # 4. The loop.
        stack.callback(notify.stopping)
        notify.ready(f"{config.url}, broker on port {config.broker.port}")
        log.info("hub runs: %s", config.url)
        tick = _Every(config.rounds.loop_s, lambda: link.tick(coordinator.tick(time.time())))

        def step() -> None:
            link.step()
            if intake.has_work():
                tick.at_once()

        due = [
            tick,
            _Every(WATCH_S, broker.watch),
            _Every(REFRESH_S, lambda: repository.refresh(time.time())),
            _Every(RENEW_S, lambda: _renew(config, authority, tls, link, broker)),
            _Every(TELL_S, strangers.tell),
            _Every(notify.watchdog_interval_s(WATCHDOG_S), notify.watchdog),  # the loop turns; not: all is well
        ]
        _loop(stop, _Every(0.0, step), due)
    log.info("hub stopped")


def _loop(stop: threading.Event, messages: "_Every", due: "list[_Every]") -> None:
    """Broker and coordinator belong to this thread: the kernel ends their children with it."""
    while not stop.is_set():
        if not messages.run_if_due(time.monotonic()):  # it waits a moment for them: there the loop rests
            stop.wait(PAUSE_S)
        for task in due:
            task.run_if_due(time.monotonic())


class _Every:
    """One thing that is done again and again; late is not made up for. What goes wrong in it holds no other up."""

    def __init__(self, interval_s: float, task: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._task = task
        self._due_at = 0.0
        self._trouble = ""
        self._told_at = 0.0

    def at_once(self) -> None:
        self._due_at = 0.0

    def run_if_due(self, now: float) -> bool:
        """False when it was due and failed."""
        if now < self._due_at:
            return True
        self._due_at = now + self._interval_s
        try:
            self._task()
        except WardroundError as error:
            if self._is_news(error, now):
                log.error("%s (%s)", error, error.advice)
        except Exception as error:  # a main loop: one message that meets our defect must not stop the fleet
            if self._is_news(error, now):
                log.exception("a defect in the hub's loop; going on")
        else:
            return True
        self._due_at = now + min(self._interval_s, RETRY_S)
        return False

    def _is_news(self, error: Exception, now: float) -> bool:
        """The same trouble is told once an hour."""
        trouble = f"{type(error).__name__} {error}".splitlines()[0]  # SQLAlchemy's further lines differ each time
        if trouble == self._trouble and now - self._told_at < TOLD_AGAIN_S:
            return False
        self._trouble, self._told_at = trouble, now
        return True


def _renew(config: Config, authority: Authority, tls: ssl.SSLContext, link: Link, broker: Broker) -> None:
    """The hub's own certificates, while it runs: new connections see the new ones, the old ones are valid for long."""
    is_renewed = setup.renew_own_certificates(config, authority, now=time.time())
    # Taken up each day, renewed or not: what failed half-way the last time is made good.
    tls.load_cert_chain(config.paths.server_certificate, config.paths.server_key)
    link.use_identity(load_identity(config.paths.hub_key, config.paths.hub_certificate))
    if is_renewed:
        log.info("the hub's own certificates: renewed")
        broker.reload()
    if setup.take_up_intermediate(config, authority):
        tls.load_verify_locations(config.paths.ca_certificate)
        broker.reload()
    if trouble := authority.trouble(time.time()):
        log.warning("%s", trouble)


def _broker(config: Config, hub: Database, authority: Authority, strangers: Strangers) -> Broker:
    def on_refused(reason: str) -> None:
        strangers.refused(device="", what="connection", reason=reason)

    def write_access() -> None:
        registry.write_access(hub, authority, config, now=time.time())

    return Broker(config, write_access=write_access, on_refused=on_refused)


@contextmanager
def _https(
    config: Config, hub: Database, authority: Authority, broker: Broker, strangers: Strangers
) -> Iterator[ssl.SSLContext]:
    """API, enrolment and hub page, in a thread of their own. Gives what holds the server's certificate."""
    context = Context(
        config=config,
        database=hub,
        authority=authority,
        strangers=strangers,
        admin_token=config.paths.admin_token.read_text("ascii").strip(),
        reload_broker=broker.reload,
        cut_off=lambda device, ordered_at: cutoff.cut_off(config, authority, device, ordered_at=ordered_at),
        broker_running=lambda: broker.running,
        clock=time.time,
    )
    settings = https.settings(
        create_app(context),
        config.paths,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=HTTPS_CONNECTIONS_MAX,
        timeout_graceful_shutdown=int(HTTPS_STOP_S // 2),
    )
    server = uvicorn.Server(settings)
    with _listening(config) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="https", daemon=True)
        thread.start()
        try:
            assert settings.ssl is not None
            yield settings.ssl
        finally:
            server.should_exit = True
            thread.join(HTTPS_STOP_S)


def _listening(config: Config) -> socket.socket:
    bind, port = config.https.bind, config.https.port
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    try:
        return socket.create_server((bind, port), family=family)
    except OSError as error:
        raise SiteError(
            f"https.port {port} on {bind} cannot be opened: {error.strerror}", advice="end what holds it, or change it"
        ) from error


@contextmanager
def _only_one(config: Config) -> Iterator[None]:
    """One process per data directory: the loop relies on being the only writer of rounds and releases."""
    try:
        lock = os.open(config.paths.data_dir / "hub.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SiteError(f"{config.paths.data_dir}: {error.strerror}", advice="make a hub first: hub init") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise SiteError(f"a hub runs on {config.paths.data_dir} already", advice="hub status; stop it first") from error
    finally:
        os.close(lock)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask the loop to end."""
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
