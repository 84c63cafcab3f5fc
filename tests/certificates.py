"""Certificates for kits that provisioning would not make: too old, for other hosts, or soon to end."""

from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from hanse.identity.authorities import CERTIFICATE_LIFETIME, Authority
from hanse.identity.certificates import Identity


def certify_anew(
    kit: Path,
    authority: Path,
    *,
    made: datetime,
    hosts: Iterable[str] = (),
    lifetime: timedelta = CERTIFICATE_LIFETIME,
) -> None:
    """Give *kit* a certificate that was made at *made*, for its key, by the authority in the folder *authority*."""
    identity = Identity.load(kit / "cert.pem", kit / "key.pem")
    certificate = Authority.load(authority).issue(
        name=identity.name,
        organisation=identity.organisation,
        role=identity.role,
        public_key=identity.key.public_key(),
        now=made,
        hosts=hosts,
        lifetime=lifetime,
    )
    (kit / "cert.pem").write_bytes(certificate)
