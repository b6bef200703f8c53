"""Errors sorted by who must act, each with one line of advice for the operator.

Reads and writes nothing.
Never carries patient data: texts name our own series numbers, rounds and releases only.
Source: STYLE.md, "Errors are sorted by who must act".
"""


class WardroundError(Exception):
    """Base of every expected failure. `advice` says what the operator does next."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class SiteError(WardroundError):
    """PACS, disk, configuration: retry and tell the site."""


class LinkError(WardroundError):
    """The other side refused or is away: go on offline, try again later."""


class TrustError(WardroundError):
    """Bad signature, wrong digest, replay, rollback: refuse, stop and alarm."""


class PeerError(TrustError):
    """Another box, not the hub, sent what cannot be: no reason to distrust the hub's releases."""


class TooFewError(TrustError):
    """Fewer boxes than a site asks for. Nobody's lie where the site asks for more than the round's plan: no alarm then."""
