"""Certificates: what one says of its holder, how it is verified, and the keys and signatures behind it.

A certificate names its holder (CN), their organisation (O) and their role (OU: ``server``, ``client`` or
``admin:<role>``), and is issued by the project's authority itself: there are no intermediates. Keys are ECDSA P-256,
which the TLS of gRPC (BoringSSL) accepts in certificates, as it does not accept Ed25519. ``authorities`` issues.

Making a key or a signature takes tens of microseconds, so an event loop may do it.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, TypeGuard

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hanse.errors import CertificateExpired, ConfigError, Unauthenticated
from hanse.identity.private_files import read_file
from hanse.ids import NAME_RULE, is_name

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey

SERVER_ROLE: Final = "server"
CLIENT_ROLE: Final = "client"
ADMIN_ROLE: Final = "admin"
"""An administrator's role is this, a colon and which kind: ``admin:lead``."""

_MAX_PEM_BYTES: Final = 64 * 1024
_MAX_ORGANISATION: Final = 64  # ub-organization-name, RFC 5280 appendix A.1
_ROLE: Final = re.compile(r"server|client|admin:[a-z][a-z0-9-]{0,31}")
_SUBJECT_PARTS: Final = (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)


def new_key() -> PrivateKey:
    """Return a fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """Return *key* as unencrypted PKCS#8 PEM: what gRPC and ``key.pem`` take."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def verify_signature(public_key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Return whether *signature* (ECDSA with SHA-256) over *data* was made with the key of *public_key*."""
    try:
        public_key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def read_key(path: Path) -> PrivateKey:
    """Return the P-256 key in the PEM file at *path*.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    return parse_key(read_file(path, what="key file"), path)


def parse_key(pem: bytes, path: Path) -> PrivateKey:
    """Return the P-256 key that *pem*, read from *path*, holds.

    Raises:
        ConfigError: it holds something else.
    """
    expected = "an ECDSA P-256 private key in PEM, without a passphrase"
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError("key file", got=str(path), expected=expected) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not is_p256(key.public_key()):
        raise ConfigError("key file", got=str(path), expected=expected)
    return key


def is_p256(key: object) -> TypeGuard[PublicKey]:
    """Return whether *key* is a public key of the one kind that is used here."""
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def certificate_der(pem: bytes) -> bytes:
    """Return the encoded certificate that *pem* holds.

    Raises:
        Unauthenticated: *pem* is not exactly one certificate.
    """
    return one_certificate(pem).public_bytes(serialization.Encoding.DER)


class Subject(NamedTuple):
    """Whom a certificate or a request names; a part that it lacks, or states twice, is empty."""

    name: str
    organisation: str
    role: str

    @classmethod
    def of(cls, name: x509.Name) -> "Subject":
        """Return the subject that *name* encodes."""
        return cls(*(_only_value(name, part) for part in _SUBJECT_PARTS))

    def __str__(self) -> str:
        return f"{self.name} ({self.organisation}, {self.role})"

    def require_certifiable(self) -> None:
        """Return if a certificate can be made for this.

        Raises:
            ConfigError: a part is missing, too long or not of its form.
        """
        if not is_name(self.name):
            raise ConfigError("name", got=self.name, expected=NAME_RULE)
        if not 1 <= len(self.organisation) <= _MAX_ORGANISATION or not self.organisation.isprintable():
            raise ConfigError("organisation", got=self.organisation, expected=f"1 to {_MAX_ORGANISATION} characters")
        if not _ROLE.fullmatch(self.role):
            raise ConfigError("role", got=self.role, expected="'server', 'client' or 'admin:<role>'")

    def encoded(self) -> x509.Name:
        """Return the subject as it stands in a certificate."""
        return x509.Name([x509.NameAttribute(part, value) for part, value in zip(_SUBJECT_PARTS, self, strict=True)])


@dataclass(frozen=True, slots=True)
class Identity:
    """Someone's own certificate and key: what it takes to open TLS as them and to sign as them.

    ``certificate`` is PEM. ``role`` and ``organisation`` are empty where the certificate states none. ``expires`` is
    aware, in UTC. The key is never shown.
    """

    certificate: bytes = field(repr=False)
    key: PrivateKey = field(repr=False)
    name: str
    organisation: str
    role: str
    expires: datetime

    @classmethod
    def load(cls, certificate_path: Path, key_path: Path) -> "Identity":
        """Return the identity that the two PEM files hold.

        Raises:
            ConfigError: a file is missing, unreadable or not what it should be, or the two do not belong together;
            the error names the file.
        """
        certificate = parse_certificate(read_file(certificate_path, what="certificate file"), certificate_path)
        key = read_key(key_path)
        if certificate.public_key() != key.public_key():
            raise ConfigError(
                "key file", got=str(key_path), expected=f"the key that the certificate in {certificate_path} is for"
            )
        holder = Subject.of(certificate.subject)
        if not holder.name:
            raise ConfigError("certificate file", got=str(certificate_path), expected="a certificate with a name (CN)")
        return cls(
            certificate=certificate_pem(certificate),
            key=key,
            name=holder.name,
            organisation=holder.organisation,
            role=holder.role,
            expires=certificate.not_valid_after_utc,
        )

    @property
    def key_pem(self) -> bytes:
        """The key as PEM, for TLS."""
        return key_pem(self.key)

    def require_valid_at(self, now: datetime) -> None:
        """Return if this identity's certificate is valid at *now*, which is aware.

        Raises:
            Unauthenticated: it has expired, or is not valid yet; the sentence says whose it is and since when.
        """
        require_valid_at(one_certificate(self.certificate), now, holder=self.name)

    def sign(self, data: bytes) -> bytes:
        """Return this identity's signature over *data*: ECDSA with SHA-256."""
        return self.key.sign(data, ec.ECDSA(hashes.SHA256()))


@dataclass(frozen=True, slots=True)
class CertifiedName:
    """What a verified certificate proves of its holder.

    ``expires`` is aware. ``fingerprint`` is SHA-256 of the certificate in hex, for people and logs. It is no handle to
    block somebody by: an ECDSA signature can be written in more ways than one, so the same certificate can have another
    fingerprint.
    """

    name: str
    organisation: str
    role: str
    public_key: PublicKey
    fingerprint: str
    expires: datetime


def verify_certificate(
    pem: bytes, roots_pem: bytes, *, now: datetime, role_prefix: str | tuple[str, ...], name: str | None = None
) -> CertifiedName:
    """Return whom the certificate *pem* names, having verified that a root issued it and that it is valid at *now*.

    *role_prefix* is the role that is asked for, or several of which one is: ``admin`` is met by ``admin:lead``,
    ``admin:lead`` by itself alone. With *name*, the certificate must be for that name. *now* is aware.

    Raises:
        Unauthenticated: it is not one certificate in PEM, another authority issued it, it has expired or is not valid
        yet, or it is for another role or name; the sentence says which.
        ConfigError: *roots_pem* holds no certificate.
    """
    certificate = one_certificate(pem)
    require_issued_by(certificate, roots_pem)  # first, so that nothing below is said of what anyone may have written
    holder = Subject.of(certificate.subject)
    require_valid_at(certificate, now, holder=holder.name)
    wanted = (role_prefix,) if isinstance(role_prefix, str) else role_prefix
    if not any(holder.role == prefix or holder.role.startswith(f"{prefix}:") for prefix in wanted):
        needed = " or ".join(map(repr, wanted))
        raise Unauthenticated(f"the certificate of {holder.name!r} is for the role {holder.role!r}, not for {needed}")
    if not holder.name or name not in (None, holder.name):
        raise Unauthenticated(f"the certificate is for {holder.name!r}, not for {name!r}")
    public_key = certificate.public_key()
    if not is_p256(public_key):
        raise Unauthenticated(f"the certificate of {holder.name!r} has a key that is not ECDSA P-256")
    return CertifiedName(
        name=holder.name,
        organisation=holder.organisation,
        role=holder.role,
        public_key=public_key,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        expires=certificate.not_valid_after_utc,
    )


def fingerprint(pem: bytes) -> str:
    """Return the SHA-256 of the one certificate in *pem*, in hex."""
    return one_certificate(pem).fingerprint(hashes.SHA256()).hex()


def new_request(key: PrivateKey, subject: Subject) -> bytes:
    """Return a signing request (PEM): *key*'s holder asks for a certificate as *subject*, and shows to have the key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject.encoded())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class SigningRequest:
    """What a signing request asks for, once its signature has shown that the asker holds the key."""

    subject: Subject
    public_key: PublicKey

    @classmethod
    def load(cls, path: Path) -> "SigningRequest":
        """Return the request in the PEM file at *path*.

        Raises:
            ConfigError: it cannot be read, is not a request for a P-256 key, or its signature does not verify.
        """
        expected = "a signing request in PEM, as 'hanse kit request' makes it"
        try:
            request = x509.load_pem_x509_csr(read_file(path, what="request file"))
            subject, public_key, intact = Subject.of(request.subject), request.public_key(), request.is_signature_valid
        except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
            raise ConfigError("request file", got=str(path), expected=expected) from error
        if not intact or not is_p256(public_key):
            raise ConfigError("request file", got=str(path), expected=f"{expected}, unchanged since")
        return cls(subject, public_key)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """Return *certificate* as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def one_certificate(pem: bytes) -> x509.Certificate:
    """Return the certificate that *pem* holds.

    Raises:
        Unauthenticated: *pem* is not exactly one certificate.
    """
    problem = "what was sent as a certificate is not one X.509 certificate in PEM"
    if len(pem) > _MAX_PEM_BYTES:  # bounds what an unknown peer can make the parser do
        raise Unauthenticated(problem)
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise Unauthenticated(problem) from error
    if len(certificates) != 1:
        raise Unauthenticated(problem)
    return certificates[0]


def certified_hosts(certificate: x509.Certificate) -> set[str]:
    """Return the DNS names and IP addresses that *certificate* is good for."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return {*alternatives.get_values_for_type(x509.DNSName), *map(str, addresses)}


def require_issued_by(certificate: x509.Certificate, roots_pem: bytes) -> None:
    """Return if one of *roots_pem* issued *certificate* itself; intermediates are not followed.

    Raises:
        Unauthenticated: none of them did.
        ConfigError: *roots_pem* holds no certificate.
    """
    try:
        roots = x509.load_pem_x509_certificates(roots_pem)
    except ValueError as error:
        raise ConfigError("root certificates", got=roots_pem[:40], expected="PEM of one certificate or more") from error
    for root in roots:
        try:
            certificate.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            continue
        return
    raise Unauthenticated("the certificate was issued by another authority than this project's; use the project's kit")


def require_valid_at(certificate: x509.Certificate, now: datetime, *, holder: str) -> None:
    """Return if *certificate* is valid at *now*; *holder* is whom the error names.

    Raises:
        CertificateExpired: it has expired.
        Unauthenticated: it is not valid yet.
    """
    if now > certificate.not_valid_after_utc:
        raise CertificateExpired(holder, since=certificate.not_valid_after_utc)
    if now < certificate.not_valid_before_utc:
        when = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise Unauthenticated(f"the certificate of {holder!r} is not valid before {when}; compare the clocks")


def parse_certificate(pem: bytes, path: Path) -> x509.Certificate:
    """Return the certificate that *pem*, read from *path*, holds.

    Raises:
        ConfigError: *pem* is not exactly one certificate.
    """
    try:
        return one_certificate(pem)
    except Unauthenticated as error:
        raise ConfigError("certificate file", got=str(path), expected="one X.509 certificate in PEM") from error


def _only_value(name: x509.Name, part: x509.ObjectIdentifier) -> str:
    # Two names in one certificate are none: which of them counts must not depend on who reads it.
    values = [attribute.value for attribute in name.get_attributes_for_oid(part)]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else ""
