"""Coded concepts of the report.

Reads and writes nothing.
Never holds a label's code: those come with the bundle.
Source: DICOM PS3.16 TID 1500, 1501, 4019; CID 100 for the procedure; chapter D for DCM codes.
"""

from highdicom.sr import CodedConcept

from models.spec import Code

PROCEDURE = {
    "XR": CodedConcept("363679005", "SCT", "Imaging procedure"),  # X-ray is only in newer editions of CID 100
    "CT": CodedConcept("25045-6", "LN", "CT unspecified body region"),
    "MR": CodedConcept("25056-3", "LN", "MRI unspecified body region"),
}
TITLE = CodedConcept("126000", "DCM", "Imaging Measurement Report")
CERTAINTY = CodedConcept("111012", "DCM", "Certainty of Finding")
PERCENT = CodedConcept("%", "UCUM", "Percent")
QUALITATIVE_EVALUATIONS = CodedConcept("C0034375", "UMLS", "Qualitative Evaluations")
IMPRESSION = CodedConcept("121073", "DCM", "Impression")
INDETERMINATE = CodedConcept("82334004", "SCT", "Indeterminate")
COMMENT = CodedConcept("121106", "DCM", "Comment")
SOURCE_FOR_PROCESSING = CodedConcept("121322", "DCM", "Source image for image processing operation")


def concept(code: Code) -> CodedConcept:
    """A label's code as it stands in the bundle."""
    return CodedConcept(code.value, code.scheme, code.meaning)
