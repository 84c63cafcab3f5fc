"""Tokens: what a participant shows after it has proven itself once, until it expires.

A token is readable text, ``<scope>~<128 random bits>~<expiry>``, and worth nothing without the server's signature that
binds it to one name. What has expired or been revoked is the caller's decision; here is only what can be computed.
"""

import base64
import binascii
import hashlib
import hmac
import math
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.certificates import Identity, verify_signature
from hanse.identity.private_files import keep_or_create
from hanse.identity.transcript import framed
from hanse.ids import JobId, Token

_DOMAIN: Final = b"hanse.identity.token.v1"
_SECRET_BYTES: Final = 32
_ID_BYTES: Final = 16
_SCOPE = r"client|admin:[a-z][a-z0-9-]{0,31}|job:[a-z0-9][a-z0-9-]{0,62}"
_IS_SCOPE = re.compile(_SCOPE)
_TOKEN = re.compile(rf"({_SCOPE})~([0-9a-f]{{{2 * _ID_BYTES}}})~(0|[1-9][0-9]{{0,11}})", re.ASCII)

CLIENT_SCOPE: Final = "client"


def admin_scope(role: str) -> str:
    """Return the scope of an administrator's token; *role* is ``admin``, ``lead`` or ``member``."""
    return f"admin:{role}"


def job_scope(job_id: JobId) -> str:
    """Return the scope of a token that is good for one job's process alone."""
    return f"job:{job_id}"


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """What a token says of itself: ``scope``, its random ``id`` (hex), and ``expires_at`` in POSIX seconds."""

    scope: str
    id: str
    expires_at: int

    @property
    def role(self) -> str | None:
        """The administrator's role; ``None`` for other scopes."""
        kind, _, role = self.scope.partition(":")
        return role if kind == "admin" else None

    @property
    def job_id(self) -> JobId | None:
        """The one job that the token is good for; ``None`` for other scopes."""
        kind, _, job_id = self.scope.partition(":")
        return JobId(job_id) if kind == "job" else None

    def is_expired(self, now_s: float) -> bool:
        """Return whether the token's time is over at *now_s* (POSIX seconds)."""
        return now_s >= self.expires_at


def new_token(
    *, now_s: float, lifetime_s: float, scope: str, random_bytes: Callable[[int], bytes] = secrets.token_bytes
) -> Token:
    """Return a fresh token of *scope* that expires *lifetime_s* seconds after *now_s* (POSIX), rounded up to a second.

    Rounded up, because the holder is told the lifetime and must never find its token dead before that.
    """
    if not _IS_SCOPE.fullmatch(scope):
        raise ValueError(f"{scope!r} is not a token's scope")
    return Token(f"{scope}~{random_bytes(_ID_BYTES).hex()}~{math.ceil(now_s + lifetime_s)}")


def parse_token(token: str) -> TokenInfo:
    """Return what *token* says of itself, expired or not; it proves nothing until its signature is verified.

    Raises:
        Unauthenticated: it is not a token. The sentence does not repeat it: tokens stay out of logs.
    """
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise Unauthenticated("the token is malformed; register again")
    return TokenInfo(scope=match[1], id=match[2], expires_at=int(match[3]))


class TokenSigner:
    """Signs tokens and verifies its own signatures: with the server's key, or with a secret where it has none.

    A signature binds one token to one name. It outlives the process: after a restart, the same key or the secret kept
    in the workspace verifies what was signed before.
    """

    def __init__(self, sign: Callable[[bytes], bytes], verify: Callable[[bytes, bytes], bool]) -> None:
        self._sign, self._verify = sign, verify

    @classmethod
    def from_identity(cls, identity: Identity) -> "TokenSigner":
        """Return the signer that uses *identity*'s key."""
        public_key = identity.key.public_key()
        return cls(identity.sign, lambda signature, data: verify_signature(public_key, signature, data))

    @classmethod
    def from_secret(cls, secret: bytes) -> "TokenSigner":
        """Return the signer that uses *secret*, 32 random bytes (HMAC-SHA256)."""
        if len(secret) != _SECRET_BYTES:
            raise ValueError(f"a token secret has {_SECRET_BYTES} bytes, not {len(secret)}")

        def sign(data: bytes) -> bytes:
            return hmac.new(secret, data, hashlib.sha256).digest()

        return cls(sign, lambda signature, data: hmac.compare_digest(signature, sign(data)))

    @classmethod
    def load_or_create(cls, path: Path, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> "TokenSigner":
        """Return the signer whose secret the file at *path* keeps; made on first use, with mode 0600.

        Raises:
            ConfigError: the file cannot be made or read, others can read it, or it does not hold a secret.
        """
        secret = keep_or_create(path, random_bytes(_SECRET_BYTES))
        if len(secret) != _SECRET_BYTES:
            raise ConfigError(
                "token secret",
                got=f"{path} with {len(secret)} bytes",
                expected=f"{_SECRET_BYTES} bytes; delete the file to have a new one made (clients then register again)",
            )
        return cls.from_secret(secret)

    def sign(self, name: str, token: str) -> str:
        """Return the signature that binds *token* to *name*, in base64url."""
        return base64.urlsafe_b64encode(self._sign(_signed_bytes(name, token))).rstrip(b"=").decode()

    def verify(self, name: str, token: str, signature: str) -> bool:
        """Return whether *signature* is this signer's binds exactly this *token* to this *name*; bad input is no."""
        try:
            padded = signature.encode("ascii") + b"=" * (-len(signature) % 4)
            raw = base64.b64decode(padded, altchars=b"-_", validate=True)
            return self._verify(raw, _signed_bytes(name, token))
        except (UnicodeError, binascii.Error):
            return False


def _signed_bytes(name: str, token: str) -> bytes:
    return framed(_DOMAIN, name.encode(), token.encode())
