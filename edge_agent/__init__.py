"""The box in a hospital: from a scanner's DICOM to a result in the PACS, from a correction to a sealed update."""
