"""Make a hub: root and intermediate, certificates, keys, first release, admin token, configuration of hub and `fleet`.

Writes the data directory; every step keeps what is there, so an interrupted `hub init` is completed by the next.
Never replaces a key: a finished hub is refused, with advice. Another intermediate stands beside the one before.
Source: ARCHITECTURE.md, "The link" and "Releases".
"""

import json
import logging
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_hub import ca, config, database, releases
from cloud_hub.ca import Authority, Issuer
from cloud_hub.config import Config
from fleet_link import pki, sealing
from fleet_link.errors import SiteError
from fleet_link.files import remove_unfinished, write_durably

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What the operator said at `hub init`."""

    data_dir: Path
    host: str
    mqtt_port: int
    https_port: int
    bind: str
    bundle: Path


def initialise(wish: Wish, *, now: float) -> Config:
    """Gives the configuration of the new hub. Raises SiteError when there is one already or the folder is in use."""
    folder = wish.data_dir.resolve()
    try:
        _check_folder(folder)
        remove_unfinished(folder)
        settings = config.load(_write_config(folder, wish))
        make_identity(settings, now=now)
        database.connect(settings.paths.database).close()
        releases.init(settings, wish.bundle, now=now)
        _write_fleet_toml(settings)  # last: it means "finished"
    except OSError as error:
        raise SiteError(
            f"{error.filename or folder}: {error.strerror}", advice="give --data-dir a folder that you may write in"
        ) from error
    log.info("hub made in %s", folder)
    return settings


def _check_folder(folder: Path) -> None:
    if (folder / "fleet.toml").exists():
        raise SiteError(f"{folder} holds a hub already", advice=f"start it: hub run --config {folder / 'hub.toml'}")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    has_begun = "hub.toml" in names or any(name.startswith(".hub.toml.") for name in names)
    if names and not has_begun:
        raise SiteError(f"{folder} is not empty and holds no hub", advice="give --data-dir a new folder")


def make_identity(settings: Config, *, now: float) -> Authority:
    """CA, the hub's certificates, sealing key and admin token; what exists is kept."""
    paths = settings.paths
    for folder in (paths.ca_key.parent, paths.server_key.parent, paths.broker, paths.releases, paths.rounds):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    if not paths.ca_certificate.exists():
        root = ca.new_root(_root_key(settings), name=f"Wardround hub {settings.https.host}", now=now)
        intermediate = _new_intermediate(settings, root, 0, now)
        write_durably(paths.ca_certificate, pki.pem([root.certificate, intermediate]), mode=0o644)
    authority = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    renew_own_certificates(settings, authority, now=now)
    if not paths.sealing_key.exists():
        sealing.new_sealing_key(paths.sealing_key)
    if not paths.admin_token.exists():
        write_durably(paths.admin_token, (secrets.token_urlsafe(32) + "\n").encode(), mode=0o600)
    return authority


def renew_own_certificates(settings: Config, authority: Authority, *, now: float) -> bool:
    """Server and hub certificate, where missing, in the last third of their life, or for other names than configured.

    True when there are new ones, on disk: who holds the former ones loads them.
    """
    renewed = False
    paths, days = settings.paths, settings.certificates.server_days
    names = list(dict.fromkeys([settings.https.host, settings.broker.host, "localhost", "127.0.0.1", "::1"]))
    server_key = _key(paths.server_key)
    if not _serves(paths.server_certificate, server_key, names, now):
        issued = authority.issue_server(server_key.public_key(), names, days=days, now=now)
        write_durably(paths.server_certificate, authority.chain_pem(issued), mode=0o644)
        renewed = True
    hub_key = _key(paths.hub_key)
    if not _serves(paths.hub_certificate, hub_key, [], now):
        issued = authority.issue_hub(hub_key.public_key(), days=days, now=now)
        write_durably(paths.hub_certificate, authority.chain_pem(issued), mode=0o644)
        renewed = True
    return renewed


def _serves(path: Path, key: ec.EllipticCurvePrivateKey, names: list[str], now: float) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    in_last_third = datetime.fromtimestamp(now, UTC) > start + (end - start) * 2 / 3
    alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    present = {str(name.value) for name in alternative}
    has_begun = start <= datetime.fromtimestamp(now, UTC)  # else it was issued before the clock went back
    is_fresh = has_begun and not in_last_third
    return certificate.public_key() == key.public_key() and is_fresh and present.issuperset(names)


def new_intermediate(settings: Config, root_key: Path, root_passphrase: Path, *, now: float) -> Issuer:
    """The next intermediate, in ca.pem with its key beside it; also while the hub runs. Raises SiteError.

    It signs when the boxes have had the time to learn of it; until then, and beside it, the one before goes on.
    """
    paths = settings.paths
    authority = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    if authority.is_single:
        raise SiteError(
            "this hub was made with one CA, which signs by itself and can have no intermediate",
            advice="it goes on as it is; for an intermediate make a new hub and move the boxes to it with new tokens",
        )
    number, last = len(authority.issuers), authority.issuers[-1]
    if number > 1 and datetime.fromtimestamp(now, UTC) < last.signs_from:
        raise SiteError("there is a new intermediate already", advice=f"it signs from {last.signs_from:%Y-%m-%d} on")
    root = Issuer(ca.load_key(root_key, root_passphrase), authority.root)
    if root.key.public_key() != authority.root.public_key():
        raise SiteError(f"{root_key} is not the key of this hub's root", advice="give --root-key the one kept offline")
    certificate = _new_intermediate(settings, root, number, now)
    write_durably(paths.ca_certificate, pki.pem([*authority.certificates, certificate]), mode=0o644)
    return ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase).issuers[-1]


def take_up_intermediate(settings: Config, authority: Authority) -> bool:
    """True when ca.pem has others than the running hub knew. Raises SiteError."""
    paths = settings.paths
    if ca.read_certificates(paths.ca_certificate) == authority.certificates:
        return False
    found = ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    if found.root != authority.root:
        raise SiteError("ca.pem has another root than the hub that runs", advice="restore ca/ from one backup")
    authority.take_up(found)
    last = authority.issuers[-1]
    log.info("the hub has another intermediate; it signs from %s on", f"{last.signs_from:%Y-%m-%d}")
    return True


def encrypt_ca(settings: Config) -> None:
    """For a hub made before its CA's key was encrypted; also while it runs. Raises SiteError."""
    paths = settings.paths
    if pki.is_encrypted(paths.ca_key):
        raise SiteError(f"{paths.ca_key} is encrypted already", advice=f"its passphrase: {settings.ca_passphrase}")
    ca.load(paths.ca_key, paths.ca_certificate, settings.ca_passphrase)
    _ca_passphrase(settings)
    ca.encrypt(paths.ca_key, settings.ca_passphrase)
    log.warning("the CA's key is encrypted from now on")


def _new_intermediate(settings: Config, root: Issuer, number: int, now: float) -> x509.Certificate:
    """For a key on disk. It counts once it stands in ca.pem: one that was cut off before that is made anew."""
    path = ca.successor(settings.paths.ca_key, number)
    key = _encrypted_key(path, settings.ca_passphrase, _ca_passphrase(settings))
    name = f"Wardround intermediate {number + 1} {settings.https.host}"
    return ca.new_intermediate(root, key.public_key(), name=name, now=now)


def _root_key(settings: Config) -> ec.EllipticCurvePrivateKey:
    paths = settings.paths
    return _encrypted_key(paths.root_key, paths.root_passphrase, _made_passphrase(paths.root_passphrase))


def _encrypted_key(path: Path, passphrase_path: Path, passphrase: bytes) -> ec.EllipticCurvePrivateKey:
    """Made on first use; the plain one of an `init` that an earlier version began is kept."""
    if not path.exists():
        return pki.new_private_key(path, passphrase=passphrase)
    return ca.load_key(path, passphrase_path)


def _ca_passphrase(settings: Config) -> bytes:
    """That of the operator, or a new one. Raises SiteError where a credential of systemd is not there."""
    if settings.certificates.ca_passphrase.startswith(config.CREDENTIAL):
        return ca.read_passphrase(settings.ca_passphrase)
    return _made_passphrase(settings.ca_passphrase)


def _made_passphrase(path: Path) -> bytes:
    """0600, made on first use."""
    if not path.exists():
        pki.write_secret(path, (secrets.token_urlsafe(32) + "\n").encode())
    return ca.read_passphrase(path)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The P-256 key at `path`, made on first use."""
    if not path.exists():
        return pki.new_private_key(path)
    try:
        return pki.load_private_key(path)
    except SiteError as error:
        raise SiteError(str(error), advice=f"restore {path.parent.name}/ from backup") from error


def _write_config(folder: Path, wish: Wish) -> Path:
    path = folder / "hub.toml"
    if path.exists():
        return path  # an interrupted init: what was said then holds
    text = config.default_text()
    for section, port in (("broker", wish.mqtt_port), ("https", wish.https_port)):
        text = config.with_value(text, section, "host", wish.host)
        text = config.with_value(text, section, "bind", wish.bind)
        text = config.with_value(text, section, "port", port)
    config.parse(text, where=path)  # a wrong host or port is refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_durably(path, text.encode(), mode=0o644)
    return path


def _write_fleet_toml(settings: Config) -> None:
    """What `fleet` reads when it is run in this folder, or with --config."""
    paths = settings.paths
    text = (
        "# For the fleet command: copy with admin.token and ca.pem to where the operator works.\n"
        f"hub = {json.dumps(settings.url)}\n"
        f"token_file = {json.dumps(os.path.relpath(paths.admin_token, paths.data_dir))}\n"
        f"ca = {json.dumps(os.path.relpath(paths.ca_certificate, paths.data_dir))}\n"
    )
    write_durably(paths.data_dir / "fleet.toml", text.encode(), mode=0o644)
