"""The way to a server: through which proxy, to which addresses, whether the port is open, and what TLS shows there."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from urllib.parse import unquote, urlsplit

from cryptography import x509
from cryptography.x509.oid import NameOID

from hanse.doctor.findings import Check, Finding, fail, ok, warn
from hanse.doctor.kit import EXPIRES_SOON
from hanse.errors import HanseError, ProtocolError, Unauthenticated, Unreachable
from hanse.identity.certificates import SERVER_ROLE, Subject, certified_hosts, require_issued_by

PROXY_VARIABLES: Final = ("grpc_proxy", "https_proxy", "http_proxy")
"""Where gRPC looks for a proxy; the first that is set counts, and only in lower case."""

EXEMPTING_VARIABLES: Final = ("no_grpc_proxy", "no_proxy")
"""Where gRPC looks for hosts that are dialled without the proxy; the first that is set counts."""

_DEFAULT_PROXY_PORT: Final = 443
_NOT_TLS: Final = ("wrong version number", "record layer failure", "packet length too long", "http request")
"""What OpenSSL says of bytes that are no TLS."""

_EXPIRED, _NOT_YET_VALID, _OTHER_HOST, _OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's codes (X509_V_ERR_…) for what can be wrong with a certificate besides who issued it."""


# The proxy ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that gRPC dials instead of the server, asking it for a tunnel (``CONNECT``).

    *credentials* is ``user:password`` as the variable has it, or empty; it is never shown.
    """

    variable: str
    host: str
    port: int
    credentials: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def proxy_for(host: str, environ: Mapping[str, str]) -> Proxy | None:
    """Return the proxy through which gRPC dials *host*, given these environment variables; ``None``: it dials itself.

    The rules are gRPC's own: https://github.com/grpc/grpc/blob/master/doc/core/default_http_proxy_mapper.md
    """
    variable = _first_set(PROXY_VARIABLES, environ)
    if variable is None or _is_exempt(host, environ.get(_first_set(EXEMPTING_VARIABLES, environ) or "", "")):
        return None
    try:
        url = urlsplit(environ[variable])
        if url.scheme != "http" or not url.hostname:
            return None
        port = url.port or _DEFAULT_PROXY_PORT
    except ValueError:
        return None
    credentials, at, _ = url.netloc.rpartition("@")
    return Proxy(variable, url.hostname, port, unquote(credentials) if at else "")


def judge_proxy(target: str, proxy: Proxy | None, environ: Mapping[str, str]) -> Finding:
    """Return whether a proxy stands in for the server at *target*, which may or may not be meant."""
    variable = _first_set(PROXY_VARIABLES, environ)
    if proxy is not None:
        text = (
            f"gRPC goes through {proxy}, as {proxy.variable} says; what runs the kit needs that in its environment "
            "too, or the server's host in no_proxy"
        )
        return warn(Check.PROXY, text, about=target)
    if variable is None:
        return ok(Check.PROXY, "none", about=target)
    exempting = _first_set(EXEMPTING_VARIABLES, environ)
    if exempting and _is_exempt(target.rpartition(":")[0], environ[exempting]):
        return ok(Check.PROXY, f"none for this host, as {exempting} says", about=target)
    text = f"{variable} is set, but not to 'http://host:port', which is all that gRPC uses: it dials without a proxy"
    return warn(Check.PROXY, text, about=target)


def _first_set(variables: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    return next((variable for variable in variables if variable in environ), None)


def _is_exempt(host: str, exempt: str) -> bool:
    host = host.strip("[]").lower()
    for entry in exempt.lower().split(","):
        suffix = entry.strip().removeprefix(".")
        if suffix and (host == suffix or host.endswith(f".{suffix}") or _is_in_network(host, suffix)):
            return True
    return False


def _is_in_network(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


# Name and port --------------------------------------------------------------------------------------------------------


def judge_name(target: str, host: str, addresses: tuple[str, ...], problem: str) -> Finding:
    """Return whether *host*, the server's of *target* or its proxy's, has addresses; *problem* is why it has none."""
    if problem:
        why = (
            f"the name {host!r} was not resolved ({problem}); check 'servers' in settings.toml, and this machine's DNS"
        )
        return fail(Check.NAME, Unreachable(target, why), about=target)
    if addresses == (host.strip("[]"),):
        return ok(Check.NAME, f"{addresses[0]} is an address", about=target)
    return ok(Check.NAME, f"{host} is {', '.join(addresses)}", about=target)


@dataclass(frozen=True, slots=True)
class PortFacts:
    """At which addresses somebody accepted a connection, and why not at the others."""

    opened: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def judge_port(target: str, facts: PortFacts, proxy: Proxy | None) -> Finding:
    """Return whether somebody accepts connections there."""
    failed = ", ".join(f"{address}: {why}" for address, why in facts.failed.items())
    if not facts.opened:
        what_to_do = (
            f"check the proxy {proxy}" if proxy else "check that the server runs, its port, and firewalls between"
        )
        return fail(Check.PORT, Unreachable(target, f"{failed}; {what_to_do}"), about=target)
    through = f" through {proxy}" if proxy else ""
    return ok(
        Check.PORT, f"open at {', '.join(facts.opened)}{through}{f' (not {failed})' if failed else ''}", about=target
    )


# TLS ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Handshake:
    """What a TLS handshake showed.

    *distrust* is OpenSSL's code for what is wrong with the certificate, 0 for nothing, and *words* its sentence.
    *refusal* says how the server ended the connection after the handshake, which is how TLS 1.3 shows that it does not
    take the client's certificate. *failure* says why there was no handshake; the rest is empty then.
    """

    certificate: x509.Certificate | None = None
    version: str = ""
    is_http2: bool = True
    distrust: int = 0
    words: str = ""
    refusal: str = ""
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Trust:
    """What a kit expects of the certificate that TLS shows it; *roots* is *authority*, but for ``tls_roots``."""

    project: str
    authority: bytes = field(repr=False)
    roots: bytes = field(repr=False)

    @property
    def is_own(self) -> bool:
        """Whether it is the project's own authority that must have issued it."""
        return self.roots == self.authority


def judge_tls(target: str, shown: Handshake, trust: Trust, now: datetime) -> Finding:
    """Return whether TLS comes about with the server at *target*, with the certificate that it must show."""
    problem = _tls_problem(target, shown, trust, now)
    if problem is not None or shown.certificate is None:
        return fail(Check.TLS, problem or Unreachable(target, "no certificate was shown"), about=target)
    end = shown.certificate.not_valid_after_utc
    text = f"{shown.version}, {_holder(shown.certificate)}, valid until {end:%Y-%m-%d %H:%M} UTC"
    if not trust.is_own:
        text = f"{text}; a proxy ends TLS here, as tls_roots says"
    if end - now < EXPIRES_SOON:
        return warn(Check.TLS, f"{text}, in {(end - now).days} days: it needs a new one", about=target)
    return ok(Check.TLS, text, about=target)


def _tls_problem(target: str, shown: Handshake, trust: Trust, now: datetime) -> HanseError | None:
    """Return what keeps TLS from coming about; ``None`` when nothing does."""
    if shown.failure:
        is_tls = not any(words in shown.failure.lower() for words in _NOT_TLS)
        why = f"the TLS handshake failed ({shown.failure})" if is_tls else "what listens there does not speak TLS"
        return Unreachable(target, f"{why}; check that it is the server's port, and 'tls' in its settings")
    if shown.certificate is None:
        return None
    if shown.distrust not in (0, _EXPIRED, _NOT_YET_VALID, _OTHER_HOST, _OTHER_ADDRESS):
        return _stranger(target, shown.certificate, shown.words, trust)
    if now > shown.certificate.not_valid_after_utc or now < shown.certificate.not_valid_before_utc:
        return _out_of_date(target, shown.certificate, now)
    if shown.distrust in (_OTHER_HOST, _OTHER_ADDRESS):
        hosts = ", ".join(sorted(certified_hosts(shown.certificate))) or "no host"
        return Unauthenticated(
            f"the certificate of the server at {target} is good for {hosts}; dial it by one of these, or have one made "
            "for the host in 'servers'"
        )
    if shown.distrust:
        return Unauthenticated(f"the certificate of the server at {target} is not good: {shown.words}; compare clocks")
    if not shown.is_http2:
        return ProtocolError(f"what {target} speaks over TLS", got="no HTTP/2", expected="HTTP/2, as gRPC needs it")
    if shown.refusal:
        return Unauthenticated(
            f"the server at {target} does not take this kit's certificate ({shown.refusal}); check its dates, and that "
            "the kit is of the server's project"
        )
    return None


def _out_of_date(target: str, certificate: x509.Certificate, now: datetime) -> Unauthenticated:
    since, until, here = (
        f"{time:%Y-%m-%d %H:%M}" for time in (certificate.not_valid_before_utc, certificate.not_valid_after_utc, now)
    )
    return Unauthenticated(
        f"the certificate of the server at {target} is valid from {since} to {until} UTC, and it is {here} UTC by this "
        "machine's clock; if that is right, the server needs a new one"
    )


def _stranger(target: str, certificate: x509.Certificate, words: str, trust: Trust) -> Unauthenticated:
    """Return what to say of a certificate that nobody issued whom the kit trusts."""
    if not trust.is_own and _is_issued_by(certificate, trust.authority):
        return Unauthenticated(
            f"the server at {target} shows the project's own certificate, and tls_roots names other authorities; "
            "no proxy ends TLS here, so take tls_roots out of settings.toml"
        )
    issuer = Subject.of(certificate.issuer)
    if Subject.of(certificate.subject).role == SERVER_ROLE:
        which = "an earlier authority of" if issuer.organisation == trust.project else "another project's authority, of"
        return Unauthenticated(
            f"the server at {target} has a certificate of {which} project {issuer.organisation!r}; "
            f"it and this kit need certificates of one authority (compare the fingerprints of their ca.pem)"
        )
    return Unauthenticated(
        f"what answers at {target} shows {_holder(certificate)}, not the server's certificate ({words}): a proxy ends "
        "TLS on the way; have it pass the connection on, or name its authority in tls_roots"
    )


def _is_issued_by(certificate: x509.Certificate, roots: bytes) -> bool:
    try:
        require_issued_by(certificate, roots)
    except HanseError:
        return False
    return True


def _holder(certificate: x509.Certificate) -> str:
    name = _common_name(certificate.subject) or ", ".join(sorted(certified_hosts(certificate)))
    issuer = _common_name(certificate.issuer) or certificate.issuer.rfc4514_string()
    return f"the certificate of {name!r} by {issuer!r}"


def _common_name(name: x509.Name) -> str:
    return next((str(part.value) for part in name.get_attributes_for_oid(NameOID.COMMON_NAME)), "")
