"""Names on the worklist: read once, and again for as long as they could not be read."""

from pathlib import Path

from edge_agent.worklist import Headers, Patient
from tests.edge_agent.dicom_support import ct_slice, write


def test_a_file_that_cannot_be_read_now_is_looked_at_again(tmp_path: Path) -> None:
    headers = Headers(tmp_path)
    assert headers.patient("a.dcm") == Patient()
    write(ct_slice("1.2.3.4"), tmp_path / "a.dcm")
    assert headers.patient("a.dcm").PatientName == "TEST, ONE"
    (tmp_path / "a.dcm").unlink()
    assert headers.patient("a.dcm").PatientName == "TEST, ONE"  # kept
