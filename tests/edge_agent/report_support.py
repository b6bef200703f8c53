"""Series, findings and judges (dciodvfy, dsrdump, PixelMed) for the tests of reading, reporting and delivery."""

import shutil
import subprocess
from pathlib import Path

import pytest

from edge_agent import decode
from edge_agent.decode import Decoded
from edge_agent.findings import Findings
from edge_agent.infer import Reader
from models.bundle import SHIPPED
from models.phantom_dicom import write_series
from models.phantoms import Phantom, phantom

CPU = ("CPUExecutionProvider",)
PIXELMED = Path("/usr/share/java/pixelmed.jar")
FINDING = {"XR": "nodule", "CT": "nodule", "MR": "haemorrhage"}


def open_reader(folder: Path) -> Reader:
    return Reader.open(SHIPPED, CPU, 1, folder)


def series(modality: str, label: str, folder: Path, *, seed: int = 7) -> tuple[Phantom, Decoded]:
    made = phantom(modality, label, seed)
    return made, decode.to_volume(write_series(made, folder / f"{modality}-{label}-{seed}", patient_seed=seed))


def findings(reader: Reader, decoded: Decoded) -> Findings:
    return reader.read(decoded.volume)


def complaints(path: Path) -> list[str]:
    """dciodvfy's error lines; it must know the object as such."""
    done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert any(name in lines for name in ("ComprehensiveSR", "SCImage")), lines
    return [line for line in lines if line.startswith("Error")]


def dump(path: Path) -> str:
    """What DCMTK's dsrdump reads, unshortened."""
    return subprocess.run(["dsrdump", "+Pl", str(path)], capture_output=True, text=True, check=True).stdout


def pixelmed(path: Path) -> list[str]:
    """Errors and warnings of PixelMed's template check; its XSLT is larger than the JDK's default limits."""
    if not PIXELMED.exists() or shutil.which("java") is None:
        pytest.skip("libpixelmed-java and a Java runtime are not installed")
    limits = [f"-Djdk.xml.xpath{name}Limit=0" for name in ("TotalOp", "ExprOp", "ExprGrp")]
    command = ["java", *limits, "-cp", str(PIXELMED), "com.pixelmed.validate.DicomSRValidator", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert "Found Root Template TID_1500 (MeasurementReport)" in lines, lines
    return [line for line in lines if line.startswith(("Error", "Warning"))]
