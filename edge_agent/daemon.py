"""The box as one process: start-up → watch → shut-down, and every thread it has.

Reads the configuration; repairs what a kill left behind before any port opens; then the threads hand over through box.db.
Never goes on with a part missing: a thread that ends by a defect ends the process, and systemd starts it anew.
"""

import logging
import signal
import sqlite3
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from threading import Event, Thread

import uvicorn

from edge_agent import bundles, catalog, database, decode, device_key, hub_change, identity, review, status
from edge_agent.bundles import ActiveBundle
from edge_agent.config import Config
from edge_agent.delivery import Delivery
from edge_agent.learner import Learner
from edge_agent.link import Link
from edge_agent.pipeline import Pipeline
from edge_agent.receive import StorageScp
from edge_agent.releases import Installer
from edge_agent.renewal import Renewal
from fleet_link import files, notify
from fleet_link.errors import SiteError, WardroundError

log = logging.getLogger(__name__)

Work = Callable[[Event], None]
WATCH_S = 5.0
STOP_TIMEOUT_S = 30.0
DATABASE_RETRY_S = 5.0
NO_IDENTITY = "identity"  # name of its alarm


@dataclass(frozen=True)
class Worker:
    name: str
    thread: Thread


def run(config: Config) -> None:
    """Until SIGTERM or SIGINT. Raises SiteError when the box cannot start."""
    notify.set_up_logging(config.box.log_level)
    decode.hush_pydicom()
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    check(config)
    with status.run_lock(config.box.data_dir):
        enrolled = _enrolled(config)
        holder = repair(config, enrolled)
        scp = StorageScp(config, on_association_end=lambda: None)
        workers = [Worker(name, _thread(name, work, stop)) for name, work in work_of(config, holder, enrolled).items()]
        try:
            scp.start()
            notify.ready(f"receiving as {config.dicom.ae_title} on port {scp.port}")
            watch(workers, stop)
        finally:
            notify.stopping()
            log.info("stopping")
            scp.stop()
            stop.set()
            _join(workers)


def check(config: Config) -> None:
    """What the site can mend, said before anything starts. Raises SiteError."""
    page = config.review
    try:
        config.box.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if page.tls_certificate and page.tls_key:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(page.tls_certificate, page.tls_key)
    except ssl.SSLError as error:
        raise SiteError(
            f"review.tls_certificate and tls_key do not fit: {error.reason}", advice="check both files"
        ) from error
    except OSError as error:
        raise SiteError(
            f"{error.filename}: {error.strerror}", advice="check the path and the service user's rights"
        ) from error


def repair(config: Config, enrolled: identity.Enrolled | None) -> ActiveBundle:
    """Make half-done work whole, and open the bundle in use."""
    files.remove_unfinished(config.box.data_dir)
    db = database.connect(config.box.data_dir)
    try:
        catalog.repair(db, config.box.data_dir, time.time())
        if enrolled is not None:
            hub_change.follow(db, config.box.data_dir, enrolled, time.time())
        return bundles.load_active(db, config, time.time())
    finally:
        db.close()


def work_of(config: Config, holder: ActiveBundle, enrolled: identity.Enrolled | None) -> dict[str, Work]:
    """What runs side by side; each item owns its thread and its database connection."""
    to_train = Event()
    work: dict[str, Work] = {
        "pipeline": Pipeline(config, holder, time.time).run,
        "review": lambda stop: serve_review(config, stop),
        "learner": Learner(config, holder, enrolled, time.time, to_train).run,
    }
    if config.pacs.enabled:
        work["delivery"] = Delivery(config, time.time).run
    if enrolled and config.hub.enabled:
        work["installer"] = Installer(config, holder, time.time).run
        work["link"] = Link(config, enrolled, holder, wake_learner=to_train.set).run
        work["renewal"] = Renewal(config, enrolled).run
    elif config.hub.enabled:
        log.warning("not linked: no rounds and no releases; run `edge-agent enroll TOKEN`")
    return work


def _enrolled(config: Config) -> identity.Enrolled | None:
    """A damaged or locked identity keeps the box from the hub, never from its scanners; status tells until it is mended."""
    data_dir = config.box.data_dir
    with closing(database.connect(data_dir)) as db:
        try:
            identity.settle(data_dir)
            passphrase = device_key.passphrase()
            identity.protect(data_dir, passphrase)
            found = identity.load(data_dir, passphrase) if identity.is_enrolled(data_dir) else None
        except SiteError as error:
            text = f"no link to the hub: {error}"
            log.error("%s (%s)", text, error.advice)
            database.raise_alarm(db, NO_IDENTITY, f"{text}: {error.advice}", time.time())
            return None
        database.end_alarm(db, NO_IDENTITY)
        return found


def watch(workers: list[Worker], stop: Event) -> None:
    """Tell systemd that all is well for as long as it is. Raises SiteError when a worker has ended by itself."""
    interval_s = notify.watchdog_interval_s(WATCH_S)
    while not stop.wait(min(interval_s, WATCH_S)):
        ended = [worker.name for worker in workers if not worker.thread.is_alive()]
        if ended:
            raise SiteError(f"{', '.join(ended)} stopped", advice="the log says why; the service starts anew")
        notify.watchdog()


def serve_review(config: Config, stop: Event) -> None:
    """The review page under uvicorn; its own signal handling stays off, ours is in `run`."""
    page = config.review
    settings = uvicorn.Config(
        review.create_app(config),
        host=page.bind,
        port=page.port,
        ssl_certfile=page.tls_certificate,
        ssl_keyfile=page.tls_key,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # else a local caller could forge addresses and pass the login brake
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(settings)

    def end_with_us() -> None:
        stop.wait()
        server.should_exit = True

    Thread(target=end_with_us, name="review-stop", daemon=True).start()
    server.run()


def _thread(name: str, work: Work, stop: Event) -> Thread:
    def guarded() -> None:
        while not stop.is_set():
            try:
                work(stop)
                return
            except (
                sqlite3.OperationalError
            ) as error:  # disk full or locked: image receipt answers 0xA700 and stays open
                log.error("%s: box.db: %s; again in %g s", name, error, DATABASE_RETRY_S)
                stop.wait(DATABASE_RETRY_S)
            except WardroundError as error:
                log.error("%s stopped: %s (%s)", name, error, error.advice)
                return
            except Exception:  # the thread's outermost frame: logged here, `watch` ends the process
                log.exception("%s stopped by a defect", name)
                return

    thread = Thread(target=guarded, name=name, daemon=True)
    thread.start()
    return thread


def _join(workers: list[Worker]) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for worker in workers:
        worker.thread.join(max(0.0, deadline - time.monotonic()))
        if worker.thread.is_alive():
            log.warning("%s did not stop in time", worker.name)
