"""The transcript of a mutual identification: the bytes that both sides sign, and that say all that they agree on.

It holds the project, both names, both nonces and both certificates, each behind its length and all behind a domain tag,
so two different conversations never have the same transcript, and a signature made here means nothing elsewhere. Each
side signs its own *half*: the transcript behind a tag of its own, so that neither's proof can be sent back as the
other's.
"""

import hashlib
from typing import Final

from hanse.identity.certificates import certificate_der

_TRANSCRIPT: Final = b"hanse.identity.transcript.v1"
_SERVER_HALF: Final = b"hanse.identity.server-half.v1"
_CLIENT_HALF: Final = b"hanse.identity.client-half.v1"
_LENGTH_BYTES: Final = 4


def transcript(
    *,
    project: str,
    client: str,
    server: str,
    client_nonce: bytes,
    server_nonce: bytes,
    client_certificate: bytes,
    server_certificate: bytes,
) -> bytes:
    """Return the transcript of one identification of *client* and *server*.

    Certificates are PEM and enter as the SHA-256 of what they encode, so line ends do not matter; empty means that
    this side has none.

    Raises:
        Unauthenticated: a certificate is not PEM.
    """
    fields = (
        project.encode(),
        client.encode(),
        server.encode(),
        client_nonce,
        server_nonce,
        _certificate_digest(client_certificate),
        _certificate_digest(server_certificate),
    )
    return framed(_TRANSCRIPT, *fields)


def server_half(transcript: bytes) -> bytes:
    """Return what the server signs to prove itself in the conversation that *transcript* stands for."""
    return framed(_SERVER_HALF, transcript)


def client_half(transcript: bytes) -> bytes:
    """Return what the client (or administrator) signs to prove itself in that conversation."""
    return framed(_CLIENT_HALF, transcript)


def framed(*fields: bytes) -> bytes:
    """Return *fields* as one string of bytes that no other sequence of fields gives: each behind its length."""
    return b"".join(len(field).to_bytes(_LENGTH_BYTES, "big") + field for field in fields)


def _certificate_digest(pem: bytes) -> bytes:
    return hashlib.sha256(certificate_der(pem)).digest() if pem else b""
