"""The device's key at rest: encrypted where systemd holds a passphrase for it, else in clear and for its owner alone (0600).

Reads the credential `device-key.passphrase`; writes key files, and encrypts in place those that lie in clear.
Never asks for the passphrase, never keeps or tells it.
Source: PKCS #8, RFC 5958; systemd.exec(5), LoadCredential=; packaging/seal-device-key makes the credential.
"""

import base64
import binascii
import logging
import os
from enum import StrEnum
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fleet_link import pki
from fleet_link.errors import SiteError
from fleet_link.files import write_durably

log = logging.getLogger(__name__)

CREDENTIAL = "device-key.passphrase"
OPENED = Path("/run/credstore") / CREDENTIAL  # by wardround-edge-key.service, for root
SEALED = Path("/etc/credstore.encrypted") / CREDENTIAL


class Seal(StrEnum):
    """What holds the passphrase."""

    TPM = "this machine's TPM"
    HOST = "this machine's disk"


# The first 16 bytes of a credential. Source: systemd, src/shared/creds-util.h.
_SEALS = {
    bytes.fromhex("5a1c6a86df9d4096b1d5a65e0862f19a"): Seal.HOST,
    bytes.fromhex("0c7cc07b117645919c4b0bea08bc20fe"): Seal.TPM,
    bytes.fromhex("93a894094874449090caf2fc93cab553"): Seal.TPM,  # and the host's key
}


class LockedError(SiteError):
    """The key is encrypted, and its passphrase is not here."""


def passphrase() -> bytes | None:
    """None where systemd holds none for this process. Raises SiteError where it holds one that cannot be used."""
    given = os.environ.get("CREDENTIALS_DIRECTORY")
    found = _read(Path(given) / CREDENTIAL) if given else None
    # For root: what was left open after the sealed one was removed is for nobody's use.
    if found is None and os.access(OPENED, os.R_OK) and SEALED.exists():
        found = _read(OPENED)
    if found == b"":
        raise SiteError(f"the credential {CREDENTIAL} is empty", advice=f"remove {SEALED} and seal another passphrase")
    return found


def load(path: Path, passphrase: bytes | None) -> ec.EllipticCurvePrivateKey:
    """Raises LockedError, or SiteError where it is missing or damaged."""
    check_open(path, passphrase)
    return pki.load_private_key(path, passphrase=passphrase)


def check_open(path: Path, passphrase: bytes | None) -> None:
    """Raises LockedError where the key needs a passphrase and there is none."""
    if passphrase is None and pki.is_encrypted(path):
        raise LockedError(
            f"{path.name} is encrypted, and its passphrase is not here",
            advice="`systemctl restart wardround-edge-key wardround-edge`; where nothing opens it any more (another machine, another TPM):"
            f" `systemctl stop wardround-edge wardround-edge-key`, remove {SEALED}, `edge-agent enroll --replace TOKEN`",
        )


def protect(path: Path, passphrase: bytes | None) -> None:
    """Put the encrypted key in the place of one in clear, in one step; nothing to do where there is no key or no passphrase."""
    if passphrase is None or not path.exists() or pki.is_encrypted(path):
        return
    key = pki.load_private_key(path)
    write_durably(path, pki.private_key_pem(key, passphrase=passphrase))
    log.info("%s is encrypted from now on", path.name)


def seal() -> Seal | None:
    """None where there is no credential, or it is another's to read."""
    try:
        return _SEALS.get(base64.b64decode(SEALED.read_bytes())[:16])
    except (OSError, binascii.Error):
        return None


def _read(path: Path) -> bytes | None:
    """Its first line."""
    try:
        return path.read_bytes().partition(b"\n")[0].strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SiteError(
            f"the credential {CREDENTIAL} cannot be read: {error.strerror}", advice=f"check {path}"
        ) from error
