"""A kit's own files: settings, key and certificates, each good by itself, all of one participant, and valid now."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509

from hanse.coordination.certificates import ENDS_SOON_S
from hanse.doctor.findings import Check, Finding, fail, ok, skip, warn
from hanse.errors import CertificateExpired, ConfigError, HanseError, Unauthenticated
from hanse.identity.certificates import Subject, parse_certificate, read_key, require_valid_at
from hanse.identity.kits import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Kit, kind_of
from hanse.identity.private_files import read_file, require_private
from hanse.identity.project import AnySettings
from hanse.settings import SETTINGS_FILE, AdminSettings, ClientSettings, ServerSettings, read

EXPIRES_SOON: Final = timedelta(seconds=ENDS_SOON_S)
"""How long before its end a certificate is warned of."""

_WHAT: Final = {ServerSettings: "the server", ClientSettings: "a client", AdminSettings: "an administrator"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class KitFacts:
    """What a kit's folder holds: each part, or the error that reading it met.

    ``kit`` is the kit as whoever uses it would load it. ``certificate`` and ``authority`` are ``None`` where there is
    none that can be read. ``has_certificates`` is false in a kit without any, which only ``tls = false`` allows.
    ``key_owner`` and ``user`` are user ids, ``None`` where there is no key.
    """

    folder: Path
    settings: AnySettings | HanseError
    key: HanseError | None
    kit: Kit[AnySettings] | HanseError
    certificate: x509.Certificate | None = None
    authority: x509.Certificate | None = None
    has_certificates: bool = True
    key_owner: int | None = None
    user: int = 0


def read_kit(folder: Path) -> KitFacts:
    """Return what *folder* holds; what cannot be read is an error in its place."""
    kind = _tried(lambda: kind_of(folder))
    settings = kind if isinstance(kind, HanseError) else _tried(lambda: read(folder / SETTINGS_FILE, kind))
    return KitFacts(
        folder,
        settings,
        _key_problem(folder / KEY_FILE),
        kind if isinstance(kind, HanseError) else _tried(lambda: Kit[AnySettings].load(folder, kind)),
        _certificate(folder / CERTIFICATE_FILE),
        _certificate(folder / CA_FILE),
        any(_is_there(folder / name) for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE)),
        _owner(folder / KEY_FILE),
        os.geteuid(),
    )


def judge_settings(facts: KitFacts) -> Finding:
    """Return whether the settings can be read and hold, and whose they are."""
    settings = facts.settings
    if isinstance(settings, HanseError):
        return fail(Check.SETTINGS, settings)
    where = (
        f"listens at {settings.target}"
        if isinstance(settings, ServerSettings)
        else f"dials {', '.join(settings.servers)}"
    )
    return ok(Check.SETTINGS, f"{settings.name} is {_WHAT[type(settings)]} of project {settings.project}; {where}")


def judge_key(facts: KitFacts) -> Finding:
    """Return whether there is a key of the right kind that its owner alone can use."""
    if not facts.has_certificates:
        return skip(Check.KEY, "a kit without certificates has none")
    if facts.key is not None:
        return fail(Check.KEY, facts.key)
    if facts.key_owner != facts.user:
        return warn(
            Check.KEY,
            f"{facts.folder / KEY_FILE} belongs to user {facts.key_owner}, and this is user {facts.user}: "
            "run the doctor as whoever runs what the kit is for",
        )
    return ok(Check.KEY, f"{facts.folder / KEY_FILE} can be used by its owner alone")


def judge_certificate(facts: KitFacts) -> Finding:
    """Return whether certificate, key, authority and settings belong together; without certificates, whether it may."""
    if not facts.has_certificates:
        if isinstance(facts.kit, HanseError) and not isinstance(facts.settings, HanseError):
            return fail(Check.CERTIFICATE, facts.kit)
        return skip(Check.CERTIFICATE, "a kit without certificates has none")
    for check, problem in ((Check.SETTINGS, facts.settings), (Check.KEY, facts.key)):
        if isinstance(problem, HanseError):
            return skip(Check.CERTIFICATE, f"'{check}' failed")
    if isinstance(facts.kit, HanseError):
        return fail(Check.CERTIFICATE, facts.kit)
    try:
        x509.load_pem_x509_certificates(facts.kit.tls_roots)
    except ValueError:
        roots = "" if isinstance(facts.kit.settings, ServerSettings) else facts.kit.settings.tls_roots
        return fail(Check.CERTIFICATE, ConfigError("tls_roots", got=roots, expected="a PEM file of certificates"))
    return ok(Check.CERTIFICATE, f"of {_subject(facts.certificate)}, issued by {facts.folder / CA_FILE} for this key")


def judge_dates(facts: KitFacts, now: datetime) -> Finding:
    """Return whether the participant's and the project's certificates are valid at *now*, and for a while yet."""
    if facts.certificate is None:
        return skip(Check.DATES, "there is no certificate to look at")
    certificates = {"the certificate of " + repr(_subject(facts.certificate).name): facts.certificate}
    if facts.authority is not None:
        certificates["the certificate of the project's authority"] = facts.authority
    for certificate in certificates.values():
        try:
            require_valid_at(certificate, now, holder=_subject(certificate).name)
        except Unauthenticated as error:
            by_clock = f"{error.reason} (it is {now:%Y-%m-%d %H:%M} UTC by this machine's clock)"
            told = CertificateExpired.told if isinstance(error, CertificateExpired) else Unauthenticated
            return fail(Check.DATES, told(by_clock))
    for whose, certificate in certificates.items():
        left = certificate.not_valid_after_utc - now
        if left < EXPIRES_SOON:
            when = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            return warn(Check.DATES, f"{whose} expires on {when}, in {left.days} days; ask the project for a new one")
    return ok(Check.DATES, f"valid until {facts.certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")


def _tried(look: Callable[[], T]) -> T | HanseError:
    try:
        return look()
    except HanseError as error:
        return error
    except OSError as error:
        expected = f"a file in a folder that user {os.geteuid()} may look into ({error.strerror})"
        return ConfigError("kit", got=str(error.filename), expected=expected)


def _key_problem(path: Path) -> HanseError | None:
    try:
        require_private(path)
        read_key(path)
    except HanseError as error:
        return error
    return None


def _certificate(path: Path) -> x509.Certificate | None:
    try:
        return parse_certificate(read_file(path), path)
    except HanseError:
        return None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that nobody lets us look into, for one: reading it will say so
        return True


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _subject(certificate: x509.Certificate | None) -> Subject:
    return Subject("", "", "") if certificate is None else Subject.of(certificate.subject)
