"""Names of things: distinct types for what would otherwise all be ``str``, and the rules for names and addresses.

A cell's address (FQCN) is a participant's name, or that name, a dot and a job's id: ``server``, ``server.<job>``,
``site-1``, ``site-1.<job>``. Names therefore hold no dot.
"""

import ipaddress
import re
from typing import NewType

ClientName = NewType("ClientName", str)
JobId = NewType("JobId", str)
Token = NewType("Token", str)
Ssid = NewType("Ssid", str)
Fqcn = NewType("Fqcn", str)
Digest = NewType("Digest", str)

SERVER = Fqcn("server")

NAME_RULE = "1 to 63 letters, digits, '-', '_' or '@', beginning with a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_@-]{0,62}")
_JOB_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TARGET = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^:\[\]\s]+):(?P<port>[0-9]{1,5})")


def is_name(text: str) -> bool:
    """Return whether *text* may name a participant (see ``NAME_RULE``): safe as a file name and in an address."""
    return _NAME.fullmatch(text) is not None


def is_job_id(text: str) -> bool:
    """Return whether *text* has the form of a job's id: lower-case letters, digits and dashes, at most 63."""
    return _JOB_ID.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Return whether *text* has the form of a digest: 64 lower-case hexadecimal digits (BLAKE3, 256 bits)."""
    return _DIGEST.fullmatch(text) is not None


def is_target(text: str) -> bool:
    """Return whether *text* is ``host:port``, with an IPv6 host in brackets and a port of 0 to 65535."""
    match = _TARGET.fullmatch(text)
    return match is not None and int(match["port"]) <= 65535


def is_dialable(target: str) -> bool:
    """Return whether *target* can be dialled, as ``0.0.0.0`` (all addresses) and port 0 (any free one) cannot."""
    if not is_target(target):
        return False
    host, _, port = target.rpartition(":")
    try:
        is_one_host = not ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        is_one_host = True
    return is_one_host and int(port) > 0


def job_cell(participant: str, job_id: JobId) -> Fqcn:
    """Return the address of *participant*'s cell for *job_id*."""
    return Fqcn(f"{participant}.{job_id}")


def split_cell(fqcn: Fqcn) -> tuple[str, JobId | None]:
    """Return the participant's name and the job's id (``None`` for a participant's own cell) that *fqcn* holds."""
    participant, _, job_id = fqcn.partition(".")
    return participant, JobId(job_id) if job_id else None
