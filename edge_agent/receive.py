"""Storage SCP: take instances from the PACS and make them durable.

Reads associations (pynetdicom's threads); writes instance files and catalog rows.
Never decodes pixels, waits for inference or talks to the hub; never answers success before the bytes are durable.
Source: DICOM PS3.4 Annex B, status codes B.2.3; PS3.7 D.3 (negotiation); PS3.8 9.3.4 (A-ASSOCIATE-RJ).
"""

import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from logging import getLogger
from typing import Any

from pydicom.uid import UID_dictionary
from pynetdicom import AE, AllStoragePresentationContexts, evt, register_uid
from pynetdicom.association import Association
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.service_class import StorageServiceClass
from pynetdicom.sop_class import Verification
from pynetdicom.transport import (
    AddressInformation,
    AssociationSocket,
    RequestHandler,
    ThreadedAssociationServer,
)

from edge_agent import catalog, instances
from edge_agent.catalog import Outcome, SeriesNo
from edge_agent.config import ANY_AE, Config
from edge_agent.database import connect
from fleet_link.errors import SiteError

log = getLogger(__name__)

SUCCESS, OUT_OF_RESOURCES, DOES_NOT_MATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000

# A-ASSOCIATE-RJ as (result, source, reason), PS3.8 9.3.4
CALLING_AE_UNKNOWN = (1, 1, 3)
CALLED_AE_UNKNOWN = (1, 1, 7)
LOCAL_LIMIT_EXCEEDED = (2, 3, 2)

ABORT = bytes.fromhex("07 00 00000004 00 00 00 00")  # A-ABORT by the service user, PS3.8 9.3.8
MAX_PDU_LENGTH = 131_072  # what we announce; DCMTK sends no more either
MAX_PDU_READ = 1 << 20  # an A-ASSOCIATE-RQ with 128 contexts may be longer than what we announce
MAX_INSTANCE_LENGTH = 2 << 30
MOST_CONNECTIONS = 2  # as a multiple of max_associations: some callers connect and stay silent
POLL_S = 0.1  # how long stop() may wait for the accept loop, and between two looks at who is storing
STOP_TIMEOUT_S = 5.0
NEVER = float("-inf")
IDLE_S = 0.5  # an association that brought no byte for so long is not storing

# Not data sets as PS3.5 encodes them: MIME, XML, Papyrus, video over SMPTE 2110; JPIP sends a link instead of pixels.
NOT_DATA_SETS = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.", "1.2.840.10008.1.20")
JPIP = ("1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.204", "1.2.840.10008.1.2.4.205")


class StorageScp:
    """Listens from start() to stop(); `on_association_end` is called in the association's thread."""

    def __init__(self, config: Config, on_association_end: Callable[[], None]) -> None:
        self._config = config
        self._on_association_end = on_association_end
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port in use: of interest where the configuration says 0."""
        assert self._server is not None
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Raises SiteError when the port cannot be opened."""
        dicom = self._config.dicom
        ae = AE(dicom.ae_title)
        ae.maximum_pdu_size = MAX_PDU_LENGTH
        ae.maximum_associations = MOST_CONNECTIONS * dicom.max_associations  # ours counts established ones only
        ae.acse_timeout = dicom.association_timeout_s
        ae.dimse_timeout = ae.network_timeout = dicom.idle_timeout_s
        handlers = [
            (evt.EVT_REQUESTED, _on_requested, [self._config]),
            (evt.EVT_ACCEPTED, _on_accepted),
            (evt.EVT_C_STORE, lambda event: event.assoc.store(event)),
        ]
        try:
            self._server = _Server(ae, self._config, handlers, self._on_association_end)
        except OSError as error:
            raise SiteError(
                f"DICOM port {dicom.bind}:{dicom.port} cannot be opened: {error.strerror or error}",
                advice="another program may listen there (ss -ltnp); change dicom.port or dicom.bind",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="scp", daemon=True)
        self._thread.start()
        log.info("listening as %s on %s:%d", dicom.ae_title, dicom.bind, self.port)

    def stop(self) -> None:
        """Take no new associations and end those that are idle; who is storing may finish within STOP_TIMEOUT_S.

        What has no answer by then is sent again by its sender.
        """
        if self._server is None or self._thread is None:
            return
        self._server.shutdown()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._server.is_storing and time.monotonic() < deadline:
            time.sleep(POLL_S)
        open_associations = self._server.active_associations
        for association in open_associations:
            association.hang_up()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for thread in (self._thread, *open_associations):
            thread.join(max(0.0, deadline - time.monotonic()))
        log.info("stopped listening")


def storage_classes() -> frozenset[str]:
    """Every storage class, retired ones too."""
    classes = {str(context.abstract_syntax) for context in AllStoragePresentationContexts}
    for uid, (name, kind, _, _, keyword) in UID_dictionary.items():
        if kind == "SOP Class" and "Storage" in name and "Commitment" not in name and uid not in classes:
            register_uid(uid, keyword, StorageServiceClass)  # pynetdicom would not know what to do with it
            classes.add(uid)
    return frozenset(classes)


def transfer_syntaxes() -> frozenset[str]:
    """Every transfer syntax that carries a data set, retired ones too."""
    return frozenset(
        uid
        for uid, entry in UID_dictionary.items()
        if entry[1] == "Transfer Syntax" and not uid.startswith(NOT_DATA_SETS) and uid not in JPIP
    )


def _on_requested(event: evt.Event, config: Config) -> None:
    """Reject a caller that the site does not know, with the reason that its own log will show."""
    assoc, dicom = event.assoc, config.dicom
    called = assoc.requestor.primitive.called_ae_title.strip()
    calling = assoc.requestor.primitive.calling_ae_title.strip()
    if called not in (dicom.ae_title, *dicom.accept_called_ae) and ANY_AE not in dicom.accept_called_ae:
        reason, why = CALLED_AE_UNKNOWN, f"called AE title {called!r}; add it to dicom.accept_called_ae"
    elif dicom.accept_calling_ae and calling not in dicom.accept_calling_ae:
        reason, why = CALLING_AE_UNKNOWN, f"calling AE title {calling!r}; add it to dicom.accept_calling_ae"
    elif assoc.server.established >= dicom.max_associations:
        reason, why = LOCAL_LIMIT_EXCEEDED, f"{dicom.max_associations} are open; raise dicom.max_associations"
    else:
        assoc.calling_ae = calling
        assoc.acceptor.supported_contexts = _supported(assoc)
        return
    log.warning("association from %r refused: %s", calling, why)
    assoc.acse.send_reject(*reason)
    assoc.kill()


def _supported(assoc: "_Association") -> list[PresentationContext]:
    """Of what the caller proposes all that we take, its first choice first: so its bytes come as it has them."""
    syntaxes: dict[str, dict[str, None]] = {}
    for context in assoc.requestor.primitive.presentation_context_definition_list:
        if context.abstract_syntax in assoc.server.classes:
            taken = (str(syntax) for syntax in context.transfer_syntax if syntax in assoc.server.syntaxes)
            syntaxes.setdefault(context.abstract_syntax, {}).update(dict.fromkeys(taken))
    return [build_context(uid, list(taken)) for uid, taken in syntaxes.items() if taken]


def _on_accepted(event: evt.Event) -> None:
    refused = sorted({context.abstract_syntax.name for context in event.assoc.rejected_contexts})
    if refused:
        log.warning(
            "%r proposed what is not taken: %s; let it send standard storage classes (PS3.4 B.5) and transfer syntaxes (PS3.6 A)",
            event.assoc.calling_ae,
            ", ".join(refused),
        )


class _Association(Association):  # type: ignore[misc]
    """One caller: its own thread, its own database connection, the series it fed."""

    def __init__(self, server: "_Server") -> None:
        super().__init__(server.ae, "acceptor")
        self.server = server
        self.calling_ae = ""
        self.heard_at = NEVER  # monotonic: the last bytes
        self._is_keeping = False
        self._db: sqlite3.Connection | None = None
        self._last_instance_at: dict[SeriesNo, float] = {}

    @property
    def is_storing(self) -> bool:
        return self._is_keeping or (self.is_established and time.monotonic() - self.heard_at < IDLE_S)

    def hang_up(self) -> None:
        """End it from another thread: its own two see the connection closed, whatever they are at, and wind up.

        pynetdicom's abort() breaks its state machine before an association is agreed, and waits 0.1 s after.
        """
        connection = self.dul.socket.socket
        with suppress(OSError, AttributeError):  # closed meanwhile
            if self.is_established:
                connection.send(ABORT)
            connection.shutdown(socket.SHUT_RDWR)
        if not self.is_established:
            self.dul.to_user_queue.put(None)  # it waits for a request, as long as association_timeout_s

    def run_reactor(self) -> None:
        """The association's whole life; what it brought is settled however it ends."""
        try:
            super().run_reactor()
        finally:
            self._end()

    def store(self, event: evt.Event) -> int:
        """C-STORE: durable bytes, then the catalog, then the answer."""
        self._is_keeping = True
        try:
            return self._keep(event.request, encode_file_meta(event.file_meta), str(event.context.transfer_syntax))
        except instances.StorageError as error:
            log.error("instance from %r refused with 0xA700: %s; %s", self.calling_ae, error, error.advice)
        except sqlite3.OperationalError as error:  # the catalog's disk: full, or locked for longer than its timeout
            log.error("instance from %r refused with 0xA700: box.db: %s", self.calling_ae, error)
        finally:
            self.heard_at = time.monotonic()
            self._is_keeping = False
        return OUT_OF_RESOURCES

    def _keep(self, request: Any, file_meta: bytes, TransferSyntaxUID: str) -> int:
        config, db = self.server.config, self._connection()
        body = request.DataSet.getbuffer()
        prefix = b"\0" * 128 + b"DICM" + file_meta
        kept = instances.keep(config.box.data_dir, (prefix, body), min_free_bytes=config.dicom.min_free_bytes)
        now = time.time()
        try:
            header = instances.read_header(body, TransferSyntaxUID)
        except instances.NotAnImageError as error:
            catalog.quarantine(db, kept, str(error), calling_ae=self.calling_ae, now=now)
            return SUCCESS
        except instances.HeaderError as error:
            return self._set_aside(kept, str(error), CANNOT_UNDERSTAND, now)
        if header.SOPClassUID != str(request.AffectedSOPClassUID):
            return self._set_aside(kept, "its SOP class is not the announced one", DOES_NOT_MATCH, now)
        if header.SOPInstanceUID != str(request.AffectedSOPInstanceUID):
            return self._set_aside(kept, "its SOPInstanceUID is not the announced one", CANNOT_UNDERSTAND, now)
        admission = catalog.add_instance(db, header, kept, calling_ae=self.calling_ae, now=now)
        if admission.outcome is Outcome.AGAIN:  # retention may have deleted it since; from here on it is wanted
            instances.keep(config.box.data_dir, (prefix, body), min_free_bytes=config.dicom.min_free_bytes)
        if admission.series_no is not None:
            self._last_instance_at[admission.series_no] = now
        return SUCCESS

    def _set_aside(self, kept: instances.Kept, reason: str, status: int, now: float) -> int:
        catalog.quarantine(self._connection(), kept, reason, calling_ae=self.calling_ae, now=now)
        log.warning("instance from %r answered with 0x%04X: %s", self.calling_ae, status, reason)
        return status

    def _connection(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = connect(self.server.config.box.data_dir)
        return self._db

    def _end(self) -> None:
        if self._db is None:
            return
        try:
            catalog.association_ended(self._db, self._last_instance_at)
        except sqlite3.OperationalError as error:
            log.error("box.db: %s; the quiet time decides when these series are due", error)
        self._db.close()
        self.server.on_association_end()


class _Socket(AssociationSocket):  # type: ignore[misc]
    """Reads with limits: no PDU longer than agreed, none slower than idle_timeout_s, no endless instance.

    Re-arms TCP_QUICKACK before each read: a sender with Nagle's algorithm otherwise waits 40 ms per instance.
    """

    def __init__(self, assoc: _Association, request: socket.socket) -> None:
        super().__init__(assoc, client_socket=request)
        self._timeout_s = assoc.server.config.dicom.idle_timeout_s
        request.settimeout(self._timeout_s)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv(self, nr_bytes: int) -> bytearray:
        """What came; shorter than asked for is the end of the connection to pynetdicom."""
        if refusal := self._refusal(nr_bytes):
            log.warning("association from %r cut: %s", self.assoc.calling_ae, refusal)
            return bytearray()
        received = bytearray(nr_bytes)
        deadline = time.monotonic() + self._timeout_s
        with memoryview(received) as view:
            count = 0
            while count < nr_bytes:
                more = self._read(view[count:], deadline)
                if more == 0:
                    break
                count += more
        del received[count:]
        return received

    def _read(self, view: memoryview, deadline: float) -> int:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0 or self.socket is None:
            return 0
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self.socket.settimeout(remaining_s)
        try:
            count = self.socket.recv_into(view)
        except TimeoutError:
            return 0
        self.assoc.heard_at = time.monotonic()
        return int(count)

    def _refusal(self, nr_bytes: int) -> str:
        if nr_bytes > MAX_PDU_READ:
            return f"a PDU of {nr_bytes} bytes; {MAX_PDU_LENGTH} were agreed"
        message = self.assoc.dimse.message
        if message is not None and message.data_set is not None and message.data_set.tell() > MAX_INSTANCE_LENGTH:
            return f"an instance of more than {MAX_INSTANCE_LENGTH} bytes"
        return ""


class _Handler(RequestHandler):  # type: ignore[misc]
    def _create_association(self) -> _Association:
        """As pynetdicom's own, which deep-copies a whole context table for each caller: 75 ms. Ours comes with the request."""
        server = self.server
        assoc = _Association(server)
        assoc._server = server
        assoc.name = "AcceptorThread"  # pynetdicom finds its associations by this name
        assoc.set_socket(_Socket(assoc, self.request))
        assoc.acceptor.maximum_length = self.ae.maximum_pdu_size
        assoc.acceptor.ae_title = server.ae_title
        assoc.acceptor.address_info = AddressInformation.from_tuple(server.server_address)
        assoc.acceptor.implementation_class_uid = self.ae.implementation_class_uid
        assoc.acceptor.implementation_version_name = self.ae.implementation_version_name
        assoc.requestor.address_info = self.remote
        for event, bound in server._handlers.items():
            for handler in bound if isinstance(bound, list) else [bound]:
                assoc.bind(event, *handler)
        return assoc


class _Server(ThreadedAssociationServer):  # type: ignore[misc]
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, ae: AE, config: Config, handlers: list[Any], on_association_end: Callable[[], None]) -> None:
        self.config = config
        self.on_association_end = on_association_end
        self.classes = storage_classes() | {Verification}
        self.syntaxes = transfer_syntaxes()
        address = (config.dicom.bind, config.dicom.port)
        super().__init__(ae, address, ae.ae_title, contexts=[], evt_handlers=handlers, request_handler=_Handler)
        ae._servers.append(self)  # its own start_server() does so too; shutdown() removes it

    def _bind_defaults(self) -> None:
        """pynetdicom's answers, without its debug log handlers: they format every PDU."""
        for event in evt._INTERVENTION_EVENTS:
            self.bind(event, evt.get_default_handler(event))

    @property
    def is_storing(self) -> bool:
        return any(association.is_storing for association in self.active_associations)

    @property
    def established(self) -> int:
        return sum(association.is_established for association in self.active_associations)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Callers that connect and say nothing cost threads: beyond the limit the connection is closed at once."""
        most = MOST_CONNECTIONS * self.config.dicom.max_associations
        if len(self.active_associations) < most:
            return True
        log.warning("connection refused: %d connections are open; raise dicom.max_associations", most)
        return False
