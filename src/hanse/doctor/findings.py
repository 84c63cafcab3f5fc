"""What a check finds, as a value: a verdict and a sentence, and for a failure the error that it stands for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from hanse.errors import HanseError


class Check(StrEnum):
    """What is looked at, in this order."""

    SETTINGS = "settings"
    KEY = "key"
    CERTIFICATE = "certificate"
    DATES = "dates"
    WORKSPACE = "workspace"
    DISK = "disk"
    DESCRIPTORS = "descriptors"
    RUNS = "runs"
    STORE = "store"
    LISTEN = "listen"
    PROXY = "proxy"
    NAME = "name"
    PORT = "port"
    TLS = "tls"
    ANSWER = "answer"
    IDENTITY = "identity"
    CLOCK = "clock"
    VERSIONS = "versions"


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """How one check came out: *text* is the sentence for people, *error* what failed.

    *about* is the server's address that it is about; empty for what is here.
    """

    check: Check
    verdict: Verdict
    text: str
    about: str = ""
    error: HanseError | None = None


def ok(check: Check, text: str, *, about: str = "") -> Finding:
    """Return that all is well."""
    return Finding(check, Verdict.OK, text, about)


def warn(check: Check, text: str, *, about: str = "") -> Finding:
    """Return that it works, but somebody should look."""
    return Finding(check, Verdict.WARN, text, about)


def fail(check: Check, error: HanseError, *, about: str = "") -> Finding:
    """Return that it does not work, because of *error*, whose sentence says what to do."""
    return Finding(check, Verdict.FAIL, error.reason, about, error)


def skip(check: Check, because: str, *, about: str = "") -> Finding:
    """Return that it was not looked at, and why."""
    return Finding(check, Verdict.SKIP, f"not checked: {because}", about)


def first_failure(findings: Iterable[Finding]) -> HanseError | None:
    """Return the error of the first of *findings* that is a failure; ``None`` when none is."""
    return next((finding.error for finding in findings if finding.error is not None), None)


def with_spares(ways: Sequence[Sequence[Finding]]) -> list[list[Finding]]:
    """Return what was found on the way to each of several servers, with warnings for what is not needed now.

    Servers are tried in turn, so one that cannot be reached hurts nobody while another serves. A refusal that trying
    again does not mend, such as another project's certificate, ends whoever meets it, and stays a failure.
    """
    if not any(_leads_to_a_server(way) for way in ways):
        return [list(way) for way in ways]
    return [[_spared(finding) for finding in way] for way in ways]


def _leads_to_a_server(way: Sequence[Finding]) -> bool:
    answers = any(finding.check is Check.ANSWER and finding.verdict is Verdict.OK for finding in way)
    return answers and all(finding.error is None for finding in way)


def _spared(finding: Finding) -> Finding:
    if finding.error is None or not finding.error.retryable:
        return finding
    text = f"{finding.text}; another address answers, and this one is missing once that does not"
    return replace(finding, verdict=Verdict.WARN, text=text, error=None)
