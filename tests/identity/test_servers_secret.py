import hashlib
import hmac
from pathlib import Path

import pytest

from hanse.errors import ConfigError
from hanse.identity.servers_secret import ServersSecret

SECRET = ServersSecret(bytes(range(32)))


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256 and no salt, as its section 2 says."""
    key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    made, block, count = b"", b"", 0
    while len(made) < length:
        count += 1
        block = hmac.new(key, block + info + bytes([count]), hashlib.sha256).digest()
        made += block
    return made[:length]


def test_what_is_derived_is_hkdf_under_a_name_for_each_use():
    tokens = hkdf(SECRET.value, b"hanse.identity.servers-secret.tokens.v1", 32)
    job_authority = hkdf(SECRET.value, b"hanse.identity.servers-secret.job-authority.v1", 48)

    assert SECRET.for_tokens() == tokens
    assert SECRET.for_job_authority() == job_authority
    assert tokens != job_authority[:32]


def test_another_secret_derives_other_things():
    other = ServersSecret(bytes(32))

    assert other.for_tokens() != SECRET.for_tokens()
    assert other.for_job_authority() != SECRET.for_job_authority()


def test_a_secret_is_32_bytes_that_do_not_repeat():
    assert len(ServersSecret.new().value) == 32
    assert ServersSecret.new() != ServersSecret.new()
    assert ServersSecret.new(random_bytes=lambda count: SECRET.value[:count]) == SECRET


def test_a_secret_is_kept_in_a_private_file_as_hexadecimal_digits(tmp_path: Path):
    path = tmp_path / "servers.secret"

    SECRET.save(path)

    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text() == "".join(f"{byte:02x}" for byte in range(32)) + "\n"
    assert ServersSecret.load(path) == SECRET


@pytest.mark.parametrize("content", [b"", b"short\n", SECRET.value, SECRET.text.upper(), SECRET.text + b"00\n"])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "servers.secret"
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(ConfigError, match=r"servers' secret is .*servers.secret'; expected 64 hexadecimal digits"):
        ServersSecret.load(path)


def test_a_secret_that_others_can_read_or_that_is_not_there_is_refused(tmp_path: Path):
    path = tmp_path / "servers.secret"
    with pytest.raises(ConfigError, match=r"servers' secret is .*No such file"):
        ServersSecret.load(path)

    SECRET.save(path)
    path.chmod(0o640)

    with pytest.raises(ConfigError, match=r"servers.secret with mode 0640"):
        ServersSecret.load(path)


def test_a_secret_is_never_shown():
    assert SECRET.value.hex() not in repr(SECRET)
    assert repr(SECRET.value) not in repr(SECRET)
