from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.certificates import Identity, new_key
from hanse.identity.servers_secret import ServersSecret
from hanse.identity.tokens import CLIENT_SCOPE, TokenInfo, TokenSigner, admin_scope, job_scope, new_token, parse_token
from hanse.ids import JobId

from .conftest import NOW

NOW_S = NOW.timestamp()
TOKEN = new_token(now_s=NOW_S, lifetime_s=60, scope=CLIENT_SCOPE)
SECRET = bytes(range(32))


@pytest.fixture(params=["key", "secret"])
def signer(request: pytest.FixtureRequest, server: Identity) -> TokenSigner:
    return TokenSigner.from_identity(server) if request.param == "key" else TokenSigner.from_secret(SECRET)


def test_a_token_says_scope_id_and_expiry():
    token = new_token(now_s=1000.25, lifetime_s=60, scope="client", random_bytes=lambda count: b"\xab" * count)

    assert token == f"client~{'ab' * 16}~1061"
    assert parse_token(token) == TokenInfo(scope="client", id="ab" * 16, expires_at=1061)


def test_tokens_do_not_repeat():
    assert len({new_token(now_s=NOW_S, lifetime_s=60, scope=CLIENT_SCOPE) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("scope", "role", "job_id"),
    [(CLIENT_SCOPE, None, None), (admin_scope("lead"), "lead", None), (job_scope(JobId("j-1")), None, "j-1")],
)
def test_a_scope_is_told_apart_after_parsing(scope: str, role: str | None, job_id: str | None):
    info = parse_token(new_token(now_s=NOW_S, lifetime_s=60, scope=scope))

    assert (info.scope, info.role, info.job_id) == (scope, role, job_id)


def test_an_expired_token_parses_and_says_that_it_is_expired():
    info = parse_token(new_token(now_s=NOW_S - 3600, lifetime_s=60, scope=CLIENT_SCOPE))

    assert info.expires_at == NOW_S - 3540
    assert info.is_expired(NOW_S)


def test_a_token_lives_for_all_of_its_lifetime_and_not_a_second_more():
    info = parse_token(new_token(now_s=1000.5, lifetime_s=10, scope=CLIENT_SCOPE))

    assert not info.is_expired(1010.5)
    assert info.is_expired(1011.5)


@pytest.mark.parametrize("scope", ["", "server", "client~x", "client\n", "admin:", "admin:Lead", "job:", "job:a.b"])
def test_a_scope_that_is_none_cannot_be_issued(scope: str):
    with pytest.raises(ValueError, match="scope"):
        new_token(now_s=NOW_S, lifetime_s=60, scope=scope)


ID = "0" * 32


@pytest.mark.parametrize(
    "text",
    [
        "",
        "client",
        f"client~{ID}",
        f"client~{ID}~",
        f"client~{ID}~-1",
        f"client~{ID}~1.5",
        f"client~{ID}~01",
        f"client~{ID}~1_000",
        f"client~{ID}~١",  # a digit to str.isdigit, not here
        f"client~{ID}~{'9' * 13}",
        f"client~{ID}~1\n",
        f" client~{ID}~1",
        f"client~{ID[1:]}~1",
        f"client~{ID[1:]}G~1",
        f"root~{ID}~1",
        f"client~{ID}~1~1",
    ],
)
def test_a_malformed_token_is_refused_and_not_repeated(text: str):
    with pytest.raises(Unauthenticated) as caught:
        parse_token(text)
    assert caught.value.reason == "the token is malformed; register again"


@given(st.text())
def test_any_text_is_a_token_or_refused(text: str):
    with pytest.raises(Unauthenticated):
        parse_token(text)


def test_a_signature_binds_a_token_to_a_name(signer: TokenSigner):
    signature = signer.sign("site-1", TOKEN)

    assert signer.verify("site-1", TOKEN, signature)
    assert signature.isascii()
    assert "=" not in signature


def test_a_stolen_token_does_not_hold_under_another_name(signer: TokenSigner):
    signature = signer.sign("site-1", TOKEN)

    assert not signer.verify("site-2", TOKEN, signature)
    assert not signer.verify("", TOKEN, signature)


def test_a_signature_does_not_hold_for_another_token(signer: TokenSigner):
    signature = signer.sign("site-1", TOKEN)
    prolonged = TOKEN[:-1] + str((int(TOKEN[-1]) + 1) % 10)

    assert not signer.verify("site-1", prolonged, signature)
    assert not signer.verify("site-1", TOKEN.replace("client", "admin:admin"), signature)


def test_a_letter_cannot_move_between_name_and_token(signer: TokenSigner):
    signature = signer.sign("ab", "cd")

    assert not signer.verify("a", "bcd", signature)
    assert not signer.verify("abc", "d", signature)


def test_a_changed_signature_does_not_hold(signer: TokenSigner):
    signature = signer.sign("site-1", TOKEN)

    for position in range(len(signature) - 1):  # the last letter's low bits are not part of the bytes
        other = "A" if signature[position] != "A" else "B"
        assert not signer.verify("site-1", TOKEN, signature[:position] + other + signature[position + 1 :])


@given(st.text())
def test_any_text_as_a_signature_is_no(text: str):
    assert not TokenSigner.from_secret(SECRET).verify("site-1", TOKEN, text)
    assert not KEY_SIGNER.verify("site-1", TOKEN, text)


def test_text_that_utf8_cannot_hold_is_no(signer: TokenSigner):
    assert not signer.verify("\ud800", TOKEN, signer.sign("site-1", TOKEN))


def test_a_token_signature_is_not_another_signers(server: Identity, site: Identity):
    of_server, of_other = TokenSigner.from_identity(server), TokenSigner.from_identity(site)

    assert not of_other.verify("site-1", TOKEN, of_server.sign("site-1", TOKEN))


def test_a_signer_with_the_servers_key_survives_a_restart(server: Identity):
    signature = TokenSigner.from_identity(server).sign("site-1", TOKEN)

    assert TokenSigner.from_identity(server).verify("site-1", TOKEN, signature)


def test_servers_that_share_a_secret_verify_each_others_tokens():
    shared = ServersSecret(SECRET)
    one, other = (TokenSigner.from_secret(shared.for_tokens()) for _ in range(2))
    stranger = TokenSigner.from_secret(ServersSecret(bytes(32)).for_tokens())
    token = f"client~{'ab' * 16}~1061"

    assert other.verify("site-1", token, one.sign("site-1", token))
    assert not stranger.verify("site-1", token, one.sign("site-1", token))
    assert (
        one.sign("site-1", token) == "dsCXVRm5Hay39ytndFgoJt-LKHfyKkRgq58RS76RdEE"
    )  # in every release, since servers may have two


def test_an_insecure_signer_survives_a_restart(tmp_path: Path):
    path = tmp_path / "workspace" / "token-secret"
    signature = TokenSigner.load_or_create(path).sign("site-1", TOKEN)

    assert TokenSigner.load_or_create(path).verify("site-1", TOKEN, signature)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["token-secret"]


def test_two_workspaces_have_two_secrets(tmp_path: Path):
    one, other = TokenSigner.load_or_create(tmp_path / "one"), TokenSigner.load_or_create(tmp_path / "other")

    assert not other.verify("site-1", TOKEN, one.sign("site-1", TOKEN))


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path):
    TokenSigner.load_or_create(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o604)

    with pytest.raises(ConfigError, match="mode 0604"):
        TokenSigner.load_or_create(tmp_path / "secret")


def test_a_damaged_secret_is_refused(tmp_path: Path):
    TokenSigner.load_or_create(tmp_path / "secret")
    (tmp_path / "secret").write_bytes(b"short")

    with pytest.raises(ConfigError, match="with 5 bytes"):
        TokenSigner.load_or_create(tmp_path / "secret")
    with pytest.raises(ValueError, match="32 bytes, not 5"):
        TokenSigner.from_secret(b"short")


def _key_signer() -> TokenSigner:
    key = new_key()
    identity = Identity(certificate=b"", key=key, name="server", organisation="", role="server", expires=NOW)
    return TokenSigner.from_identity(identity)


KEY_SIGNER = _key_signer()
