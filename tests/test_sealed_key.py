"""The device's key under a systemd that boots: sealed to the host's key, opened for the service, and lost with the machine.

Needs root and systemd-nspawn. No TPM is in play here: `systemd-creds --with-key=auto` takes the host's key.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.processes import BIN
from tests.edge_agent.link_support import enrol_offline
from tests.fleet_link.mosquitto_support import TestAuthority

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
BOOT_S = 240.0
SETTINGS = {
    "box.data_dir": "/var/lib/wardround-edge",
    "hub.enabled": "false",
    "inference.providers": '["CPUExecutionProvider"]',
    "dicom.min_free_bytes": "0",
}
# Each step writes one line `name: what came of it`.
STEPS = f"""
agent() {{ command={BIN}/edge-agent; verb=$1; shift; $command $verb --config /etc/wardround/edge-agent.toml "$@"; }}
key() {{ head -1 /var/lib/wardround-edge/identity/device.key; }}
active() {{ systemctl is-active wardround-edge wardround-edge-key | tr '\\n' ' '; }}
said() {{ echo "$1: $2"; }}
agent init {" ".join(f"--set '{key}={value}'" for key, value in SETTINGS.items())} >&2
chmod 0755 /etc/wardround; chmod 0644 /etc/wardround/edge-agent.toml
cp -r /identity /var/lib/wardround-edge/identity
chown -R wardround-edge:wardround-edge /var/lib/wardround-edge
systemctl start wardround-edge; said "before" "$? $(active)$(key)"
sh /packaging/seal-device-key; said "sealing" "$? $(stat -c %a /etc/credstore.encrypted/device-key.passphrase)"
passphrase=$(cat /run/credstore/device-key.passphrase)
sh /packaging/seal-device-key; said "sealing again" "$?"
systemctl restart wardround-edge; said "sealed" "$? $(active)$(key)"
said "mode" "$(stat -c '%a %U' /var/lib/wardround-edge/identity/device.key)"
agent doctor >/tmp/doctor; said "doctor" "$(grep 'device key' /tmp/doctor)"
said "passphrase on disk" "$(grep -rlF "$passphrase" /etc /var | wc -l)"
rm /var/lib/systemd/credential.secret; echo other | systemd-creds encrypt --with-key=host --name=other - /tmp/other
systemctl stop wardround-edge wardround-edge-key; said "stopped" "$(ls /run/credstore | wc -l)"
systemctl start wardround-edge; said "on another machine" "$? $(active)"
said "status" "$(agent status | grep 'alarm')"
systemctl poweroff --force --force
"""


def nspawn(machine: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """In a machine that has this one's programs and nothing else of it."""
    binds = {Path("/usr"), ROOT, Path(sys.base_prefix)}
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe"]
    command += [
        f"--bind-ro={path}" for path in sorted(binds) if path == Path("/usr") or not path.is_relative_to("/usr")
    ]
    return subprocess.run([*command, "-D", machine, *arguments], capture_output=True, timeout=BOOT_S, check=False)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder to boot, with our units in it."""
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        pytest.skip("needs root and systemd-nspawn (Debian: systemd-container)")
    made = tmp_path / "machine"
    for folder in (
        "etc/systemd/system/wardround-edge.service.d",
        "etc/wardround",
        "usr",
        "var/lib",
        "var/log",
        "root",
        "tmp",
    ):
        (made / folder).mkdir(parents=True)
    (made / "root").chmod(0o755)  # where Python may lie
    for link in ("bin", "sbin", "lib", "lib64"):
        (made / link).symlink_to(f"usr/{link}")
    for name in ("passwd", "group", "nsswitch.conf", "ld.so.cache"):
        shutil.copy(f"/etc/{name}", made / "etc" / name)
    for name, line in (("passwd", "x:990:990::/nonexistent:/usr/sbin/nologin"), ("group", "x:990:")):
        with (made / "etc" / name).open("a") as file:
            file.write(f"wardround-edge:{line}\n")
    (made / "etc/os-release").write_text("ID=test\n")
    (made / "etc/machine-id").write_text("")
    shutil.copytree(PACKAGING, made / "packaging")
    units = made / "etc/systemd/system"
    for unit in PACKAGING.glob("wardround-edge*.service"):
        (units / unit.name).write_text(unit.read_text().replace("/usr/bin/edge-agent", f"{BIN}/edge-agent"))
    (units / "wardround-edge.service.d/here.conf").write_text(
        "[Service]\nProtectHome=no\nPrivateTmp=no\nTimeoutStartSec=120\n"
    )
    (units / "steps.service").write_text(
        "[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nExecStart=/bin/sh /steps\n"
        "StandardOutput=file:/var/log/steps\nStandardError=file:/var/log/troubles\n"
    )
    (made / "steps").write_text(STEPS)
    enrol_offline(tmp_path, TestAuthority(), 8883)
    shutil.copytree(tmp_path / "identity", made / "identity")
    probed = nspawn(made, "/usr/bin/true")
    if probed.returncode:
        pytest.skip(f"systemd-nspawn does not work here: {probed.stderr.decode()[-200:]}")
    return made


@pytest.mark.slow
def test_a_sealed_key_is_encrypted_opens_for_the_service_and_never_keeps_the_box_from_reading(machine: Path) -> None:
    nspawn(machine, "--boot", "--", "--unit=steps.service")
    troubles = (machine / "var/log/troubles").read_text()
    said = dict(line.split(": ", 1) for line in (machine / "var/log/steps").read_text().splitlines() if ": " in line)
    assert said["before"] == "0 active inactive -----BEGIN PRIVATE KEY-----", troubles
    assert (said["sealing"], said["sealing again"]) == ("0 600", "1")
    assert said["sealed"] == "0 active active -----BEGIN ENCRYPTED PRIVATE KEY-----"
    assert said["mode"] == "600 wardround-edge"
    assert "encrypted; the host's key on this disk opens it" in said["doctor"]
    assert (said["passphrase on disk"], said["stopped"]) == ("0", "0")
    assert said["on another machine"] == "0 active failed "
    assert "no link to the hub: device.key is encrypted" in said["status"]
