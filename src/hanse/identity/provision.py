"""Making startup kits, in either of two ways.

The operator makes a kit whole (``provision``) and hands it over. Or the site makes its own key and a request for a
certificate (``request``), the operator answers with the rest (``approve``), and the site puts that beside its key
(``install``); then the key never leaves the site.

Where a project has standbys, the kits of all its servers get the secret that these share. It is made once and kept with
the authority, so that a server that comes later gets the same. An answer to a server's request has it too, and so is
not for everybody's eyes.

Everything is made beside its place, checked by the same ``Kit.load`` that will read it, and only then moved there.
Nothing that exists is ever written over, except by ``install``, which replaces a kit's certificates.
"""

import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from io import BytesIO
from pathlib import Path
from typing import Final

from cryptography import x509

from hanse.errors import ConfigError, Conflict
from hanse.identity.authorities import AUTHORITY_CERTIFICATE, Authority
from hanse.identity.certificates import (
    PublicKey,
    SigningRequest,
    Subject,
    certified_hosts,
    fingerprint,
    key_pem,
    new_key,
    new_request,
    parse_certificate,
    read_key,
)
from hanse.identity.kits import CA_FILE, CERTIFICATE_FILE, KEY_FILE, REQUEST_FILE, Kit, settings_kind
from hanse.identity.private_files import (
    PRIVATE_FILE,
    PUBLIC_FILE,
    make_private_folder,
    read_file,
    replace_file,
    require_private,
    sync_names_in,
)
from hanse.identity.project import AUTHORITY_FOLDER, Participant, Project
from hanse.identity.servers_secret import SERVERS_SECRET_FILE, ServersSecret
from hanse.settings import SETTINGS_FILE, ServerSettings, checked, read

_APPROVED_FILES: Final = (CA_FILE, SETTINGS_FILE, SERVERS_SECRET_FILE, CERTIFICATE_FILE)
"""As installed: with the last one, the kit is whole. The secret is there for servers that share one."""
_PRIVATE_FILES: Final = (SETTINGS_FILE, SERVERS_SECRET_FILE)
_MAX_FILE_BYTES: Final = 256 * 1024
_ZIP_TIME: Final = (1980, 1, 1, 0, 0, 0)  # the earliest that the format knows: equal content, equal bytes


class KitState(StrEnum):
    """What became of a kit."""

    MADE = "made"
    KEPT = "kept"
    AWAITS_REQUEST = "awaits request"
    REQUESTED = "requested"
    APPROVED = "approved"
    INSTALLED = "installed"


@dataclass(frozen=True, slots=True)
class KitReport:
    """What was done about one participant's kit, for people.

    ``path`` is the kit, request or approved file. ``expires`` is when its certificate ends, ``None`` where there is
    none yet. ``authority`` is the SHA-256 of the project's certificate: site and operator compare it by another way
    before the site trusts the kit. ``note`` is a sentence that the operator should read, or empty.
    """

    name: str
    role: str
    state: KitState
    path: Path
    expires: datetime | None = None
    authority: str = ""
    note: str = ""


def provision(project_file: Path, out: Path, *, now: datetime) -> list[KitReport]:
    """Make the project's authority and a kit for each participant under *out*, where there is none yet.

    Run again after adding participants to the file, it makes theirs and leaves every existing file as it is; where a
    kept kit no longer says what the file says, its report has a note. Participants with ``own_key`` get none.

    Raises:
        ConfigError: the file does not hold, or *out* belongs to another project; nothing has been made then.
    """
    project = read(project_file, Project)
    participants = list(project.participants())
    authority, is_new = _authority(project, participants, out, now=now)
    secret = _servers_secret(participants, out)
    make_private_folder(out)
    with _staging(out) as staging:
        newcomers = [one for one in participants if not one.own_key and not (out / one.name).exists()]
        for newcomer in newcomers:
            _make_kit(staging / newcomer.name, newcomer, project, authority, secret, now=now)
        if is_new:  # in its place before any kit that trusts it
            authority.save(out / AUTHORITY_FOLDER)
        if secret is not None and not (kept := out / AUTHORITY_FOLDER / SERVERS_SECRET_FILE).exists():
            secret.save(kept)
        for newcomer in newcomers:
            (staging / newcomer.name).rename(out / newcomer.name)
        sync_names_in(out)
    return [_provisioned(one, out, authority, secret, is_new=one in newcomers) for one in participants]


def request(name: str, organisation: str, role: str, folder: Path) -> KitReport:
    """Make a key in *folder* that stays there, and ``request.pem`` beside it, which goes to the project's operator.

    *role* is as in certificates: ``server``, ``client``, ``admin:lead``, … A folder whose key exists but whose
    request is missing gets the request.

    Raises:
        ConfigError: name, organisation or role cannot be certified, or a file cannot be written.
        Conflict: the folder already has a request.
    """
    subject = Subject(name, organisation, role)
    subject.require_certifiable()
    make_private_folder(folder)
    request_path, key_path = folder / REQUEST_FILE, folder / KEY_FILE
    if request_path.exists():
        raise Conflict(f"the request {request_path}", state="already made", wanted="made again")
    if not key_path.exists():
        replace_file(key_path, key_pem(new_key()))
    require_private(key_path)
    replace_file(request_path, new_request(read_key(key_path), subject), mode=PUBLIC_FILE)
    return KitReport(name, role, KitState.REQUESTED, request_path)


def approve(request_file: Path, authority_folder: Path, project_file: Path, out: Path, *, now: datetime) -> KitReport:
    """Answer a site's request with everything of its kit but the key: *out* is a new ``.zip`` file or folder.

    What the certificate says is what the project's file says; the request has to say the same. Where servers share a
    secret, the answer to one of them has it, and only its owner can read *out*.

    Raises:
        ConfigError: the request is not intact, the file does not list its name, or lists another role or organisation,
        or the servers' secret is not there.
        Conflict: *out* exists.
    """
    asked = SigningRequest.load(request_file)
    project = read(project_file, Project)
    authority = _authority_of(project, authority_folder)
    participant = next((one for one in project.participants() if one.name == asked.subject.name), None)
    if participant is None:
        raise ConfigError("the request's name", got=asked.subject.name, expected=f"one that {project_file} lists")
    if asked.subject != participant.subject:
        expected = f"{str(participant.subject)!r}, as {project_file} says"
        raise ConfigError("the request's subject", got=str(asked.subject), expected=expected)
    if out.exists():
        raise Conflict(str(out), state="already there", wanted="made")
    certificate = _certificate(participant, asked.public_key, project, authority, now=now)
    files = {
        CA_FILE: authority.certificate,
        SETTINGS_FILE: participant.settings_text().encode(),
        CERTIFICATE_FILE: certificate,
    }
    note = ""
    if participant.shares_secret:
        files[SERVERS_SECRET_FILE] = _kept_secret(authority_folder).text
        note = f"{out} holds the servers' secret: hand it over on a way that nobody else can read"
    _write_approved(out, files)
    return KitReport(
        participant.name,
        participant.role,
        KitState.APPROVED,
        out,
        expires=parse_certificate(certificate, out).not_valid_after_utc,
        authority=authority.fingerprint,
        note=note,
    )


def install(approved: Path, folder: Path) -> KitReport:
    """Put what the operator *approved* (a ``.zip`` file or folder) beside the key in *folder*, and check the whole kit.

    A ``settings.toml`` that is already there stays: it is the site's.

    Raises:
        ConfigError: *approved* is not what ``approve`` makes, is for another key, or does not hold together; the
        folder is unchanged then.
    """
    key_path = folder / KEY_FILE
    require_private(key_path)
    files = _read_approved(approved)
    key = read_key(key_path)
    certificate = parse_certificate(files[CERTIFICATE_FILE], approved)
    if certificate.public_key() != key.public_key():
        raise ConfigError("approved kit", got=str(approved), expected=f"a certificate for the key in {key_path}")
    notes = []
    if (folder / SETTINGS_FILE).exists():
        files[SETTINGS_FILE] = read_file(folder / SETTINGS_FILE)
        notes.append(f"the {SETTINGS_FILE} that was there stays")
    if (folder / CA_FILE).exists() and read_file(folder / CA_FILE) != files[CA_FILE]:
        notes.append("the project's authority is another than before: compare its fingerprint with the operator")
    secret_path = folder / SERVERS_SECRET_FILE
    if SERVERS_SECRET_FILE in files and secret_path.exists() and read_file(secret_path) != files[SERVERS_SECRET_FILE]:
        notes.append("the servers' secret is another than before: all servers need this one")
    subject = Subject.of(certificate.subject)
    with _staging(folder) as staging:
        for name, content in files.items():
            replace_file(staging / name, content, mode=_mode(name))
        replace_file(staging / KEY_FILE, key_pem(key))
        Kit.load(staging, settings_kind(subject.role))
        for name in files:
            (staging / name).replace(folder / name)
        sync_names_in(folder)
    return KitReport(
        subject.name,
        subject.role,
        KitState.INSTALLED,
        folder,
        expires=certificate.not_valid_after_utc,
        authority=fingerprint(files[CA_FILE]),
        note="; ".join(notes),
    )


def _authority(
    project: Project, participants: list[Participant], out: Path, *, now: datetime
) -> tuple[Authority, bool]:
    folder = out / AUTHORITY_FOLDER
    if (folder / AUTHORITY_CERTIFICATE).exists():
        return _authority_of(project, folder), False
    orphans = [str(out / one.name) for one in participants if (out / one.name).exists()]
    if orphans:
        # A second authority would issue kits that the existing ones do not trust, and nobody would see why.
        raise ConfigError("authority folder", got=f"no {folder}", expected=f"the one that made {orphans[0]}")
    return Authority.create(project.name, now=now), True


def _authority_of(project: Project, folder: Path) -> Authority:
    authority = Authority.load(folder)
    if authority.project != project.name:
        raise ConfigError(
            "project name", got=project.name, expected=f"{authority.project!r}, whose authority lies in {folder}"
        )
    return authority


def _servers_secret(participants: list[Participant], out: Path) -> ServersSecret | None:
    """Return what the project's servers share, kept or new; ``None`` where there is one server alone."""
    sharing = [one for one in participants if one.shares_secret]
    if not sharing:
        return None
    if (out / AUTHORITY_FOLDER / SERVERS_SECRET_FILE).exists():
        return _kept_secret(out / AUTHORITY_FOLDER)
    for path in (out / one.name / SERVERS_SECRET_FILE for one in sharing):
        if path.exists():  # with a second secret, servers would refuse each other's tokens, and nobody would see why
            expected = f"the one that {path} is a copy of; copy it back"
            raise ConfigError("servers' secret", got=f"no {out / AUTHORITY_FOLDER / path.name}", expected=expected)
    return ServersSecret.new()


def _kept_secret(authority_folder: Path) -> ServersSecret:
    path = authority_folder / SERVERS_SECRET_FILE
    if not path.exists():
        expected = "what 'hanse provision' makes there for a project with standbys; run it first"
        raise ConfigError("servers' secret", got=f"no {path}", expected=expected)
    return ServersSecret.load(path)


def _certificate(
    participant: Participant, public_key: PublicKey, project: Project, authority: Authority, *, now: datetime
) -> bytes:
    return authority.issue(
        name=participant.name,
        organisation=participant.organisation,
        role=participant.role,
        public_key=public_key,
        now=now,
        hosts=participant.hosts,
        lifetime=project.lifetime,
    )


def _make_kit(
    folder: Path,
    participant: Participant,
    project: Project,
    authority: Authority,
    secret: ServersSecret | None,
    *,
    now: datetime,
) -> None:
    key = new_key()
    make_private_folder(folder)
    if secret is not None and participant.shares_secret:
        secret.save(folder / SERVERS_SECRET_FILE)
    replace_file(folder / SETTINGS_FILE, participant.settings_text().encode(), mode=_mode(SETTINGS_FILE))
    replace_file(folder / CA_FILE, authority.certificate, mode=PUBLIC_FILE)
    certificate = _certificate(participant, key.public_key(), project, authority, now=now)
    replace_file(folder / CERTIFICATE_FILE, certificate, mode=PUBLIC_FILE)
    replace_file(folder / KEY_FILE, key_pem(key))
    Kit.load(folder, participant.kind)


def _mode(name: str) -> int:
    """Return the mode of the file *name* of a kit: settings may hold a password."""
    return PRIVATE_FILE if name in _PRIVATE_FILES else PUBLIC_FILE


def _provisioned(
    participant: Participant, out: Path, authority: Authority, secret: ServersSecret | None, *, is_new: bool
) -> KitReport:
    folder = out / participant.name
    name, role = participant.name, participant.role
    if not folder.exists():
        note = f"{name} makes its own key: hanse kit request, approve, install"
        return KitReport(name, role, KitState.AWAITS_REQUEST, folder, authority=authority.fingerprint, note=note)
    try:
        path = folder / CERTIFICATE_FILE
        certificate = parse_certificate(read_file(path, what="certificate file"), path)
    except ConfigError as error:
        return KitReport(name, role, KitState.KEPT, folder, authority=authority.fingerprint, note=error.reason)
    where = out / AUTHORITY_FOLDER / SERVERS_SECRET_FILE
    differences = (
        _other_certificate(participant, certificate, folder),
        _lack_of_secret(folder / SERVERS_SECRET_FILE, secret, where) if participant.shares_secret else "",
        _unknown_servers(participant, folder / SETTINGS_FILE),
    )
    return KitReport(
        name,
        role,
        KitState.MADE if is_new else KitState.KEPT,
        folder,
        expires=certificate.not_valid_after_utc,
        authority=authority.fingerprint,
        note="; ".join(filter(None, differences)),
    )


def _lack_of_secret(path: Path, secret: ServersSecret | None, where: Path) -> str:
    try:
        if path.exists() and ServersSecret.load(path) == secret:
            return ""
    except ConfigError as error:
        return error.reason
    return (
        f"it lacks the servers' secret: copy {where} to {path}, and write store and runs, as the project's file has "
        f"them, to its {SETTINGS_FILE}"
    )


def _unknown_servers(participant: Participant, path: Path) -> str:
    """Return what a client or administrator has to write, whose settings do not name all servers of the project."""
    try:
        kept = read(path, participant.kind)
    except ConfigError as error:
        return error.reason
    now = checked(participant.settings, participant.kind)
    if isinstance(kept, ServerSettings) or isinstance(now, ServerSettings):
        return ""
    missing = [name for name in now.server_names if name not in kept.server_names]
    if not missing:
        return ""
    lines = f"servers = {json.dumps(now.servers)} and server_names = {json.dumps(now.server_names)}"
    return f"it does not know {', '.join(missing)}: write {lines} to its {SETTINGS_FILE}"


def _other_certificate(participant: Participant, certificate: x509.Certificate, folder: Path) -> str:
    subject = Subject.of(certificate.subject)
    missing = sorted(set(participant.hosts) - certified_hosts(certificate))
    if subject == participant.subject and not missing:
        return ""
    what = f"lacks the hosts {', '.join(missing)}" if missing else f"is for {subject}, not for {participant.subject}"
    return f"its certificate {what}; move {folder} away and provision again for a new kit"


def _write_approved(out: Path, files: Mapping[str, bytes]) -> None:
    make_private_folder(out.parent)
    with _staging(out.parent) as staging:
        made = staging / "approved"
        if out.suffix == ".zip":
            packed = BytesIO()
            with zipfile.ZipFile(packed, "w") as archive:
                for name, content in sorted(files.items()):
                    archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), content)
            replace_file(made, packed.getvalue())
        else:
            make_private_folder(made)
            for name, content in files.items():
                replace_file(made / name, content, mode=_mode(name))
        made.rename(out)
        sync_names_in(out.parent)


def _read_approved(approved: Path) -> dict[str, bytes]:
    expected = f"a folder or .zip file with {', '.join(_named(()))}, as 'hanse kit approve' makes it"
    if approved.is_dir():
        present = {path.name for path in approved.iterdir()}
        return {name: read_file(approved / name) for name in _named(present)}
    try:
        with zipfile.ZipFile(approved) as archive:
            files = {name: _read_member(archive, name) for name in _named(archive.namelist())}
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError("approved kit", got=str(approved), expected=expected) from error
    return files


def _named(present: Container[str]) -> list[str]:
    """Return which files to read of an answer that has those *present*: all, but the secret only where there is one."""
    return [name for name in _APPROVED_FILES if name != SERVERS_SECRET_FILE or name in present]


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        content = member.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"{name} is larger than {_MAX_FILE_BYTES} bytes")
    return content


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a new private folder in *folder*, from where what is made there can be renamed; removed at the end."""
    try:
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    except OSError as error:
        raise ConfigError(
            "folder", got=str(folder), expected=f"one that can be written to ({error.strerror})"
        ) from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
