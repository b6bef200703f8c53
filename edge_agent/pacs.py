"""Storage SCU: hand one object at a time to the PACS over an association that stays open.

Reads report files; speaks C-STORE.
Never decides when to try again (delivery.py does) and never keeps the PACS's comment, which may name a patient.
Source: PS3.4 B.2.3 (status codes), PS3.7 C (general ones), PS3.8 9.3.4 (rejections).
"""

import socket
import threading
from dataclasses import dataclass
from enum import Enum
from logging import getLogger
from pathlib import Path

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import (
    ComprehensiveSRStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association
from pynetdicom.status import STORAGE_SERVICE_CLASS_STATUS

from edge_agent.config import Pacs
from fleet_link.errors import SiteError

log = getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0
IDLE_S = 20.0  # released after this; PACS close an idle association after 30 s or more
SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]

SUCCESS, DUPLICATE_INSTANCE = 0x0000, 0x0111
GENERAL_WARNINGS = (0x0001, 0x0107, 0x0116)
PASSING = (0x0110, 0x0210, 0x0213)  # processing failure, duplicate invocation, resource limitation


class Outcome(Enum):
    DELIVERED = "delivered"  # the PACS has it
    LATER = "later"  # it could not take it now
    REFUSED = "refused"  # it will not take this object, however often it is asked


@dataclass(frozen=True)
class Answer:
    outcome: Outcome
    text: str = ""  # why not, or with what reservation


class PacsAwayError(SiteError):
    """No association, or it broke while an object was on its way."""


class PacsSender:
    """Owned by one thread."""

    def __init__(self, pacs: Pacs) -> None:
        self._pacs = pacs
        self._association: Association | None = None
        self._used_at = 0.0

    def store(self, path: Path, now: float) -> Answer:
        """Send one DICOM file. Raises PacsAwayError when the PACS cannot be reached; then nothing is known of the object."""
        try:
            ds = dcmread(path)
        except FileNotFoundError:
            return Answer(Outcome.REFUSED, "the report file is gone")
        except (InvalidDicomError, EOFError, ValueError):
            return Answer(Outcome.REFUSED, "the report file is damaged")
        except OSError as error:
            return Answer(Outcome.LATER, f"the report file cannot be read: {error.strerror}")
        was_open = self._is_open
        self._used_at = now
        try:
            return self._store(ds)
        except PacsAwayError:
            if not was_open:
                raise
            return self._store(ds)  # the PACS had closed the idle association: not a failure yet

    def release_idle(self, now: float) -> None:
        if self._is_open and now - self._used_at > IDLE_S:
            self.close()

    def close(self) -> None:
        if self._association is not None and self._association.is_established:
            self._association.release()
        self._association = None

    @property
    def _is_open(self) -> bool:
        return self._association is not None and self._association.is_established

    def _store(self, ds: Dataset) -> Answer:
        association = self._open()
        try:
            status = association.send_c_store(ds)
        except ValueError:  # no accepted presentation context
            return Answer(Outcome.REFUSED, f"the PACS does not take {ds.SOPClassUID.name}: allow it there, then retry")
        except RuntimeError as error:  # closed between the look and the request
            raise self._away("the PACS closed the association") from error
        if "Status" not in status:
            raise self._away("the PACS did not answer a C-STORE")
        return judge(int(status.Status))

    def _open(self) -> Association:
        if self._association is not None and self._association.is_established:
            return self._association
        ae = AE(self._pacs.calling_ae_title)
        ae.connection_timeout = CONNECT_TIMEOUT_S
        ae.acse_timeout = ae.dimse_timeout = ANSWER_TIMEOUT_S
        ae.network_timeout = 2 * IDLE_S
        for storage in (ComprehensiveSRStorage, SecondaryCaptureImageStorage):
            ae.add_requested_context(storage, SYNTAXES)
        try:
            self._association = ae.associate(
                self._pacs.host,
                self._pacs.port,
                ae_title=self._pacs.ae_title,
                evt_handlers=[(evt.EVT_CONN_OPEN, _without_delay), (evt.EVT_CONN_OPEN, _without_theft)],
            )
        except OSError as error:  # a host name that does not resolve
            raise self._away(f"{self._pacs.host} cannot be reached: {error.strerror}") from error
        if not self._association.is_established:
            raise self._away(_why_not(self._association))
        return self._association

    def _away(self, reason: str) -> PacsAwayError:
        if self._association is not None and self._association.is_established:
            self._association.abort()
        self._association = None
        return PacsAwayError(reason, advice="check [pacs] host, port and AE titles, and that the PACS knows this box")


def judge(status: int) -> Answer:
    """What a C-STORE status means for the object."""
    meaning = STORAGE_SERVICE_CLASS_STATUS.get(status, ("", ""))[1]
    text = f"0x{status:04X} {meaning}".strip()
    if status == SUCCESS:
        return Answer(Outcome.DELIVERED)
    if 0xB000 <= status <= 0xBFFF or status in (*GENERAL_WARNINGS, DUPLICATE_INSTANCE):
        return Answer(Outcome.DELIVERED, text)
    if 0xA700 <= status <= 0xA7FF or status in PASSING:
        return Answer(Outcome.LATER, text)
    return Answer(Outcome.REFUSED, text)


def _why_not(association: Association) -> str:
    if association.is_rejected:
        rejection = association.acceptor.primitive
        return f"the PACS rejected the association: {rejection.reason_str}"
    if association.is_aborted:
        return "the PACS aborted the association, or there is none at that address"
    return "the PACS accepted none of the report's presentation contexts"


class _PromptSocket(socket.socket):
    """A stock PACS sends its answer in two parts and, by Nagle, the second only after our ACK, which may take 40 ms.

    TCP_QUICKACK does not last, so it is set before each read. Orthanc 1.10: 52 ms for each report without, 10 ms with.
    Source: tcp(7).
    """

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return super().recv(bufsize, flags)


def _without_delay(event: evt.Event) -> None:
    transport = event.assoc.dul.socket
    prompt = _PromptSocket(fileno=transport.socket.detach())
    prompt.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport.socket = prompt


class _Checkpoint(threading.Event):
    """Where pynetdicom's reactor thread rests while we wait for an answer.

    The library says "I rest" before it looks whether it may go on: a thread that is held up between the two takes the PACS's
    answer for a request, and we wait 30 s for one that has come (seen in one of five demonstrations). Here "I go on" is
    said under the lock under which it is stopped.
    """

    def __init__(self, association: Association) -> None:
        super().__init__()
        self._association = association
        self._looking = threading.Lock()
        self.set()

    def clear(self) -> None:
        with self._looking:
            super().clear()

    def wait(self, timeout: float | None = None) -> bool:
        while super().wait(timeout):
            with self._looking:
                if self.is_set():
                    self._association._is_paused = False
                    return True
        return False


def _without_theft(event: evt.Event) -> None:
    event.assoc._reactor_checkpoint = _Checkpoint(event.assoc)
