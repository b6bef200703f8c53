"""What must never leave a box, and a search for it in files."""

from collections.abc import Iterable
from pathlib import Path

from pydicom.dataset import Dataset

# Elements whose values name a person or a visit, and the UIDs that lead to them (PS3.15 Annex E, Table E.1-1).
KEYWORDS = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
)


def patient_words(datasets: Iterable[Dataset]) -> set[bytes]:
    """Each value as it would stand in a text; names also in their parts that are not in every name."""
    words = {str(ds.get(keyword, "")).encode() for ds in datasets for keyword in KEYWORDS}
    return {word for word in words if len(word) >= 6}


def found_in(place: Path, words: set[bytes]) -> set[bytes]:
    """Which of the words stand in the file, or in a file below the folder."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    assert files, f"{place} has no files to search"
    return {word for path in files for content in [_content(path)] for word in words if word in content}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # a running hub tidies up
        return b""
