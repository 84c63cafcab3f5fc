"""A project with its authority, and identities that it issued: made once, since nothing changes them."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hanse.identity.authorities import Authority
from hanse.identity.certificates import Identity, key_pem, new_key

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)

IdentityMaker = Callable[..., Identity]


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority.create("demo", now=NOW)


@pytest.fixture(scope="session")
def make_identity(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> IdentityMaker:
    """Issue and load: ``make_identity("site-1", role="client", by=authority, now=NOW, **more)``."""

    def make(name: str, *, role: str = "client", by: Authority = authority, now: datetime = NOW, **more) -> Identity:
        folder = tmp_path_factory.mktemp("identity")
        key = new_key()
        pem = by.issue(name=name, organisation="Site", role=role, public_key=key.public_key(), now=now, **more)
        return load_identity(folder, pem, key_pem(key))

    return make


def load_identity(folder: Path, certificate: bytes, key: bytes) -> Identity:
    (folder / "cert.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    return Identity.load(folder / "cert.pem", folder / "key.pem")


@pytest.fixture(scope="session")
def site(make_identity: IdentityMaker) -> Identity:
    return make_identity("site-1")


@pytest.fixture(scope="session")
def server(make_identity: IdentityMaker) -> Identity:
    return make_identity("server", role="server", hosts=("localhost", "127.0.0.1", "::1"))
