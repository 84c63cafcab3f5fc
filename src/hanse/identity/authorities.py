"""Authorities: a project's, which issues every participant's certificate, and a server's own for its jobs' processes.

What they issue is what ``certificates`` reads and verifies: P-256 keys, one step from the root, the name in CN, the
organisation in O, the role in OU.
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.certificates import (
    SERVER_ROLE,
    Identity,
    PrivateKey,
    PublicKey,
    Subject,
    certificate_pem,
    fingerprint,
    is_p256,
    key_pem,
    new_key,
    one_certificate,
    parse_certificate,
    parse_key,
    require_issued_by,
    require_valid_at,
)
from hanse.identity.private_files import (
    PUBLIC_FILE,
    keep_or_create,
    make_private_folder,
    replace_file,
    require_private,
)
from hanse.ids import Fqcn, is_name

AUTHORITY_CERTIFICATE: Final = "ca.pem"
AUTHORITY_KEY: Final = "ca.key"

AUTHORITY_LIFETIME: Final = timedelta(days=3650)
CERTIFICATE_LIFETIME: Final = timedelta(days=360)
BACKDATED: Final = timedelta(hours=1)
"""How far before its making a certificate is valid, so that a site whose clock is a little slow can use it at once."""

_MAX_COMMON_NAME: Final = 64  # ub-common-name, RFC 5280 appendix A.1
_MAX_PROJECT: Final = _MAX_COMMON_NAME - len(" CA")
_DNS_LABEL: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_JOB_URI: Final = "hanse-job:"
_JOB_AUTHORITY_FILE: Final = "job-authority.pem"
_P256_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # SEC 2, 2.4.2
_KEY_SEED_BYTES: Final = 40  # the order's 256 bits and 64 more


@dataclass(frozen=True, slots=True)
class Authority:
    """A project's certificate authority: its certificate (PEM), which all trust, and the key that issues."""

    project: str
    certificate: bytes = field(repr=False)
    key: PrivateKey = field(repr=False)

    @classmethod
    def create(cls, project: str, *, now: datetime, lifetime: timedelta = AUTHORITY_LIFETIME) -> "Authority":
        """Return a new authority for *project*, valid for *lifetime* from *now*.

        Raises:
            ConfigError: *project* is not a name, or too long to stand in a certificate.
        """
        if not is_name(project) or len(project) > _MAX_PROJECT:
            raise ConfigError("project", got=project, expected=f"a name of at most {_MAX_PROJECT} characters")
        key = new_key()
        certificate = _self_signed(f"{project} CA", project, key, now=now, lifetime=lifetime)
        return cls(project, certificate_pem(certificate), key)

    @classmethod
    def load(cls, folder: Path) -> "Authority":
        """Return the authority whose ``ca.pem`` and ``ca.key`` lie in *folder*.

        Raises:
            ConfigError: a file is missing, not what it should be, or readable by others; it names the file.
        """
        require_private(folder / AUTHORITY_KEY)
        identity = Identity.load(folder / AUTHORITY_CERTIFICATE, folder / AUTHORITY_KEY)
        return cls(identity.organisation, identity.certificate, identity.key)

    def save(self, folder: Path) -> None:
        """Write ``ca.key`` (mode 0600) and ``ca.pem`` into *folder* (0700), in this order."""
        make_private_folder(folder)
        replace_file(folder / AUTHORITY_KEY, key_pem(self.key))
        replace_file(folder / AUTHORITY_CERTIFICATE, self.certificate, mode=PUBLIC_FILE)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the authority's certificate, in hex: what people compare by another way before they trust it."""
        return fingerprint(self.certificate)

    def issue(
        self,
        *,
        name: str,
        organisation: str,
        role: str,
        public_key: PublicKey,
        now: datetime,
        hosts: Iterable[str] = (),
        lifetime: timedelta = CERTIFICATE_LIFETIME,
    ) -> bytes:
        """Return a certificate (PEM) that binds *public_key* to *name*, *organisation* and *role*.

        *hosts* are the DNS names and IP addresses under which a server is reached; a server's own name is always among
        them, so that a client may also ask for that. It ends with the authority's own certificate at the latest.

        Raises:
            ConfigError: a field is not allowed, the key is not P-256, or the authority has expired.
        """
        subject = Subject(name, organisation, role)
        subject.require_certifiable()
        if not is_p256(public_key):
            raise ConfigError("public key", got=type(public_key).__name__, expected="an ECDSA P-256 key")
        alternatives = [_general_name(host) for host in hosts]
        if role == SERVER_ROLE and _is_dns_name(name):
            alternatives.append(x509.DNSName(name))
        usage = ExtendedKeyUsageOID.SERVER_AUTH if role == SERVER_ROLE else ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = _issued(
            subject.encoded(),
            public_key,
            alternatives=list(dict.fromkeys(alternatives)),
            usage=usage,
            issuer=x509.load_pem_x509_certificate(self.certificate),
            issuer_key=self.key,
            now=now,
            lifetime=lifetime,
        )
        return certificate_pem(certificate)


@dataclass(frozen=True, slots=True)
class JobAuthority:
    """A server's own authority for its jobs' processes: what it issues opens a TLS connection and nothing more.

    Such a certificate never proves a participant, because ``verify_certificate`` is given the project's roots alone.
    The listener adds ``certificate`` (PEM) to the roots that TLS accepts. The certificate of a job's process names its
    cell in a URI (``hanse-job:<fqcn>``) and, where the 64 characters of a CN hold it, there too. Servers that share a
    secret share this authority: each verifies what another has issued.
    """

    certificate: bytes = field(repr=False)
    key: PrivateKey = field(repr=False)

    @classmethod
    def from_secret(cls, secret: bytes, *, now: datetime) -> "JobAuthority":
        """Return the authority that *secret*, at least 40 random bytes, determines: what one issues, all verify.

        Key and name come from *secret* alone, and that is all that counts when certificates are verified. The
        authority's own is made anew each time: valid for a lifetime from *now*, and for one before it, so that a clock
        that is set back does not undo it.
        """
        if len(secret) < _KEY_SEED_BYTES:
            raise ValueError(f"a job authority's secret has at least {_KEY_SEED_BYTES} bytes, not {len(secret)}")
        # 64 bits more than the order has make every key about as likely: NIST FIPS 186-5, A.2.1.
        number = int.from_bytes(secret, "big") % (_P256_ORDER - 1) + 1
        key = ec.derive_private_key(number, ec.SECP256R1())
        return cls(_job_root(key, now=now), key)

    @classmethod
    def load_or_create(cls, folder: Path, *, now: datetime) -> "JobAuthority":
        """Return the authority kept in *folder*, in one file with mode 0600, made on first use.

        The key is what is kept. Its certificate is made anew each time, as by ``from_secret``: the one in the file was
        made by a clock that may have been wrong.

        Raises:
            ConfigError: the file cannot be made or read, others can read it, or it is not what it should be.
        """
        path = folder / _JOB_AUTHORITY_FILE
        key = cls._parse(keep_or_create(path, cls._new_file(now)), path)
        return cls(_job_root(key, now=now), key)

    @property
    def key_id(self) -> str:
        """The authority's key by a name, in hex: RFC 5280, 4.2.1.2 (1)."""
        return x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()).digest.hex()

    @staticmethod
    def _new_file(now: datetime) -> bytes:
        key = new_key()
        return key_pem(key) + _job_root(key, now=now)

    @staticmethod
    def _parse(content: bytes, path: Path) -> PrivateKey:
        key_part, begin, certificate_part = content.partition(b"-----BEGIN CERTIFICATE-----")
        key = parse_key(key_part, path)
        parse_certificate(begin + certificate_part, path)
        return key

    def issue(self, fqcn: Fqcn, *, now: datetime, lifetime: timedelta = CERTIFICATE_LIFETIME) -> tuple[bytes, bytes]:
        """Return a certificate and its new key, both PEM, for the job's process whose cell is *fqcn*.

        It is valid for *lifetime* from *now*, and for as long before: a clock that is set back does not undo it.
        """
        key = new_key()
        certificate = _issued(
            Subject(fqcn if len(fqcn) <= _MAX_COMMON_NAME else "job", "Hanse", "job").encoded(),
            key.public_key(),
            alternatives=[x509.UniformResourceIdentifier(f"{_JOB_URI}{fqcn}")],
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            issuer=x509.load_pem_x509_certificate(self.certificate),
            issuer_key=self.key,
            now=now,
            lifetime=lifetime,
            backdated=lifetime,
        )
        return certificate_pem(certificate), key_pem(key)

    def verify(self, pem: bytes, *, now: datetime) -> Fqcn:
        """Return the cell that the job certificate *pem* names.

        Raises:
            Unauthenticated: it is not one certificate, this authority did not issue it, or it is not valid at *now*.
        """
        certificate = one_certificate(pem)
        require_issued_by(certificate, self.certificate)
        try:
            alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound as error:  # the authority's own certificate, which anybody can have seen
            raise Unauthenticated("the certificate is not that of a job's process") from error
        (uri,) = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
        fqcn = Fqcn(uri.removeprefix(_JOB_URI))
        require_valid_at(certificate, now, holder=fqcn)
        return fqcn


def _job_root(key: PrivateKey, *, now: datetime) -> bytes:
    lifetime = AUTHORITY_LIFETIME
    return certificate_pem(_self_signed("Hanse jobs", "Hanse", key, now=now, lifetime=lifetime, backdated=lifetime))


def _self_signed(
    name: str,
    organisation: str,
    key: PrivateKey,
    *,
    now: datetime,
    lifetime: timedelta,
    backdated: timedelta = BACKDATED,
) -> x509.Certificate:
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)]
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - backdated)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(for_authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def _issued(
    subject: x509.Name,
    public_key: PublicKey,
    *,
    alternatives: list[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    issuer: x509.Certificate,
    issuer_key: PrivateKey,
    now: datetime,
    lifetime: timedelta,
    backdated: timedelta = BACKDATED,
) -> x509.Certificate:
    if issuer.not_valid_after_utc <= now:
        raise ConfigError(
            "authority's certificate",
            got=f"expired since {issuer.not_valid_after_utc:%Y-%m-%d}",
            expected="one that is still valid; provision the project anew",
        )
    issuer_identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - backdated)
        .not_valid_after(min(now + lifetime, issuer.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(for_authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier), critical=False
        )
    )
    if alternatives:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _key_usage(*, for_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not for_authority,
        key_cert_sign=for_authority,
        crl_sign=for_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _is_dns_name(host.removeprefix("*.")):
            raise ConfigError(
                "hosts", got=host, expected="a DNS name in ASCII or an IP address, without port or brackets"
            ) from None
        return x509.DNSName(host)


def _is_dns_name(text: str) -> bool:
    return len(text) <= 253 and all(_DNS_LABEL.fullmatch(label) for label in text.split("."))
