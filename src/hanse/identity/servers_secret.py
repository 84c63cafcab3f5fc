"""The secret that the servers of one project share, and what each derives from it.

Every server's kit holds the same file, so that a token or a job's certificate that one server has given is good at the
others: a client that turns to a standby goes on with what it has. For each use the servers derive other bytes from it
(HKDF, RFC 5869, with SHA-256), so that none of them tells anything of another.
"""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hanse.errors import ConfigError
from hanse.identity.private_files import read_file, replace_file, require_private

SERVERS_SECRET_FILE: Final = "servers.secret"  # noqa: S105 - a file's name

_SECRET_BYTES: Final = 32
_TOKENS: Final = b"hanse.identity.servers-secret.tokens.v1"
_JOB_AUTHORITY: Final = b"hanse.identity.servers-secret.job-authority.v1"
_TOKEN_BYTES: Final = 32
_JOB_AUTHORITY_BYTES: Final = 48
_FORM: Final = re.compile(rb"[0-9a-f]{64}\n?")


@dataclass(frozen=True, slots=True)
class ServersSecret:
    """32 random bytes that the servers of one project, and nobody else, know."""

    value: bytes = field(repr=False)

    @classmethod
    def new(cls, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes) -> "ServersSecret":
        """Return a fresh secret."""
        return cls(random_bytes(_SECRET_BYTES))

    @classmethod
    def load(cls, path: Path) -> "ServersSecret":
        """Return the secret in the file at *path*.

        Raises:
            ConfigError: it cannot be read, others can read it, or it holds something else.
        """
        require_private(path, what="servers' secret")
        content = read_file(path, what="servers' secret")
        if not _FORM.fullmatch(content):
            expected = "64 hexadecimal digits; copy the file from the kit of another server"
            raise ConfigError("servers' secret", got=str(path), expected=expected)
        return cls(bytes.fromhex(content.decode()))

    def save(self, path: Path) -> None:
        """Write the secret to *path*, with mode 0600.

        Raises:
            ConfigError: the file cannot be written.
        """
        replace_file(path, self.text)

    @property
    def text(self) -> bytes:
        """What stands in the file."""
        return f"{self.value.hex()}\n".encode()

    def for_tokens(self) -> bytes:
        """Return what signs the tokens that the servers give."""
        return self._derived(_TOKENS, _TOKEN_BYTES)

    def for_job_authority(self) -> bytes:
        """Return what determines the servers' authority for jobs' processes."""
        return self._derived(_JOB_AUTHORITY, _JOB_AUTHORITY_BYTES)

    def _derived(self, purpose: bytes, size: int) -> bytes:
        # Without a salt: what is derived from is itself random, and all servers have to come to the same.
        return HKDF(algorithm=hashes.SHA256(), length=size, salt=None, info=purpose).derive(self.value)
