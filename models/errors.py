"""What can be wrong with a volume, a bundle or a delta.

Reads and writes nothing.
Never carries patient data.
"""


class ModelError(Exception):
    """Base. `advice` says what the operator does next."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class VolumeError(ModelError):
    """A series that cannot become the array the network was trained on."""


class BundleError(ModelError):
    """A bundle that is malformed, inconsistent or fails its known-answer batch."""


class DeltaError(ModelError):
    """A weight delta with a wrong name, shape, type or value."""


class CaseError(ModelError):
    """A reviewed case or a reading that no statistic can be computed from."""


class SpecError(ModelError):
    """A network from elsewhere that cannot be imported, or what is said of it that is not so."""
