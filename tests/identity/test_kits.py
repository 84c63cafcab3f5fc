import dataclasses
from datetime import timedelta
from pathlib import Path

import pytest

from hanse.errors import ConfigError, Unauthenticated
from hanse.identity.authorities import Authority
from hanse.identity.certificates import Identity
from hanse.identity.kits import Kit, kind_of, settings_kind
from hanse.identity.servers_secret import ServersSecret
from hanse.settings import AdminSettings, ClientSettings, ServerSettings

from .conftest import IdentityMaker

SERVER = 'project = "demo"\nstore = "postgresql://hanse@db/hanse"\nruns = "/shared/runs"\n'
SETTINGS = 'project = "demo"\nname = "site-1"\nservers = ["localhost:6007"]\n'


@pytest.fixture
def folder(tmp_path: Path, authority: Authority, site: Identity) -> Path:
    return write_kit(tmp_path, site, authority.certificate)


def write_kit(folder: Path, identity: Identity, ca_pem: bytes, settings: str = SETTINGS) -> Path:
    (folder / "settings.toml").write_text(settings)
    (folder / "ca.pem").write_bytes(ca_pem)
    (folder / "cert.pem").write_bytes(identity.certificate)
    (folder / "key.pem").write_bytes(identity.key_pem)
    (folder / "key.pem").chmod(0o600)
    return folder


def test_a_kit_holds_settings_identity_and_authority(folder: Path, authority: Authority):
    kit = Kit.load(folder, ClientSettings)

    assert kit.settings.servers == ("localhost:6007",)
    assert kit.identity is not None
    assert (kit.identity.name, kit.identity.role) == ("site-1", "client")
    assert kit.ca_pem == authority.certificate
    assert kit.resolve(kit.settings.workspace) == folder / "workspace"
    assert kit.resolve("/srv/hanse") == Path("/srv/hanse")


@pytest.mark.parametrize("name", ["settings.toml", "ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()

    with pytest.raises(ConfigError, match=rf"{folder / name}"):
        Kit.load(folder, ClientSettings)


def test_a_kit_that_awaits_approval_says_so(folder: Path):
    (folder / "request.pem").write_bytes(b"")
    (folder / "cert.pem").unlink()

    with pytest.raises(ConfigError, match=r"without cert.pem'; expected what 'hanse kit install' makes"):
        Kit.load(folder, ClientSettings)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused(folder: Path, bits: int):
    (folder / "key.pem").chmod(bits)

    with pytest.raises(ConfigError, match=rf"key.pem with mode {bits:04o}"):
        Kit.load(folder, ClientSettings)


def test_a_key_of_another_kit_is_refused(folder: Path, server: Identity):
    (folder / "key.pem").write_bytes(server.key_pem)

    with pytest.raises(ConfigError, match="key file"):
        Kit.load(folder, ClientSettings)


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path, authority: Authority, site: Identity):
    other = Authority.create("demo", now=site.expires)
    write_kit(tmp_path, site, other.certificate)

    with pytest.raises(ConfigError, match=r"cert.pem'; expected one issued by .*ca.pem"):
        Kit.load(tmp_path, ClientSettings)


def test_settings_of_another_name_or_project_are_refused(tmp_path: Path, authority: Authority, site: Identity):
    write_kit(tmp_path, site, authority.certificate, SETTINGS.replace("site-1", "site-2"))
    with pytest.raises(ConfigError, match="name is 'site-2'; expected 'site-1'"):
        Kit.load(tmp_path, ClientSettings)

    write_kit(tmp_path, site, authority.certificate, SETTINGS.replace("demo", "other"))
    with pytest.raises(ConfigError, match="project is 'other'; expected 'demo'"):
        Kit.load(tmp_path, ClientSettings)


def test_a_kit_of_another_kind_is_refused_as_what_it_is(
    tmp_path: Path, authority: Authority, make_identity: IdentityMaker
):
    write_kit(tmp_path, make_identity("site-1", role="admin:lead"), authority.certificate)

    assert Kit.load(tmp_path, AdminSettings).settings.name == "site-1"
    for kind, wanted in ((ClientSettings, "a client's"), (ServerSettings, "a server's")):
        with pytest.raises(ConfigError, match=f"; expected {wanted}, and this one is an administrator's") as wrong:
            Kit.load(tmp_path, kind)
        assert str(tmp_path) in str(wrong.value)


def test_a_kit_without_certificates_needs_tls_to_be_off(tmp_path: Path):
    (tmp_path / "settings.toml").write_text(SETTINGS + "tls = false\n")
    kit = Kit.load(tmp_path, ClientSettings)
    assert (kit.identity, kit.ca_pem) == (None, b"")

    (tmp_path / "settings.toml").write_text(SETTINGS)
    with pytest.raises(ConfigError, match=r"key.pem"):
        Kit.load(tmp_path, ClientSettings)


def test_a_kit_behind_a_proxy_has_no_tls_and_keeps_its_identity(folder: Path):
    (folder / "settings.toml").write_text(SETTINGS + "tls = false\n")
    kit = Kit.load(folder, ClientSettings)
    assert kit.identity is not None

    (folder / "ca.pem").unlink()  # half an identity is a mistake, not an insecure kit
    with pytest.raises(ConfigError, match=r"ca.pem"):
        Kit.load(folder, ClientSettings)


def test_a_kit_never_shows_its_key(folder: Path):
    assert "PRIVATE" not in repr(Kit.load(folder, ClientSettings))


def test_each_role_has_its_settings():
    assert settings_kind("server") is ServerSettings
    assert settings_kind("client") is ClientSettings
    assert settings_kind("admin:member") is AdminSettings
    with pytest.raises(ConfigError, match="role"):
        settings_kind("job")


@pytest.mark.parametrize(
    ("role", "kind"), [("server", ServerSettings), ("client", ClientSettings), ("admin:lead", AdminSettings)]
)
def test_a_certificate_says_of_which_kind_a_kit_is(
    folder: Path, make_identity: IdentityMaker, role: str, kind: type[object]
):
    (folder / "cert.pem").write_bytes(make_identity("site-1", role=role).certificate)

    assert kind_of(folder) is kind


@pytest.mark.parametrize(
    ("settings", "kind"), [(SETTINGS, ClientSettings), ('project = "demo"\ntarget = "0.0.0.0:1"\n', ServerSettings)]
)
@pytest.mark.parametrize("certificate", [None, b"nothing"])
def test_where_no_certificate_says_it_the_settings_do(
    tmp_path: Path, settings: str, kind: type[object], certificate: bytes | None
):
    (tmp_path / "settings.toml").write_text(settings)
    if certificate is not None:
        (tmp_path / "cert.pem").write_bytes(certificate)

    assert kind_of(tmp_path) is kind


def test_a_folder_without_anything_is_of_no_kind(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"settings\.toml"):
        kind_of(tmp_path)
    (tmp_path / "request.pem").write_bytes(b"")
    with pytest.raises(ConfigError, match="what 'hanse kit install' makes of it"):
        kind_of(tmp_path)


def test_a_kit_is_valid_as_long_as_its_certificate(folder: Path, tmp_path: Path):
    kit = Kit.load(folder, ClientSettings)
    assert kit.identity is not None

    kit.require_valid_at(kit.identity.expires)
    with pytest.raises(Unauthenticated, match="the certificate of 'site-1' expired"):
        kit.require_valid_at(kit.identity.expires + timedelta(seconds=1))
    without = dataclasses.replace(kit, identity=None)
    without.require_valid_at(kit.identity.expires + timedelta(days=9999))


@pytest.fixture
def server_folder(tmp_path: Path, authority: Authority, server: Identity) -> Path:
    """The kit of a server that shares what it knows with others."""
    ServersSecret.new().save(tmp_path / "servers.secret")
    return write_kit(tmp_path, server, authority.certificate, SERVER)


def test_a_servers_kit_says_where_the_shared_secret_is(server_folder: Path):
    assert Kit.load(server_folder, ServerSettings).servers_secret == server_folder / "servers.secret"

    (server_folder / "servers.secret").unlink()
    assert Kit.load(server_folder, ServerSettings).servers_secret is None


@pytest.mark.parametrize("field", ["store", "runs"])
def test_servers_that_share_a_secret_share_store_and_runs(server_folder: Path, field: str):
    settings = server_folder / "settings.toml"
    lines = [line for line in SERVER.splitlines() if not line.startswith(field)]
    settings.write_text("\n".join(lines))

    with pytest.raises(ConfigError, match=f"^{field} is ''; expected what the project's servers share"):
        Kit.load(server_folder, ServerSettings)
    (server_folder / "servers.secret").unlink()
    assert Kit.load(server_folder, ServerSettings)  # a server that is alone may have either


@pytest.mark.parametrize("damage", ["mode", "content"])
def test_a_servers_secret_that_is_not_usable_is_refused(server_folder: Path, damage: str):
    path = server_folder / "servers.secret"
    if damage == "mode":
        path.chmod(0o644)
    else:
        path.write_text("x")

    with pytest.raises(ConfigError, match="servers' secret"):
        Kit.load(server_folder, ServerSettings)


def test_settings_with_a_password_are_refused_when_others_can_read_them(server_folder: Path):
    settings = server_folder / "settings.toml"
    settings.write_text(SERVER.replace("hanse@", "hanse:sesame@"))
    settings.chmod(0o644)
    with pytest.raises(ConfigError, match=r"settings file with a password is .*settings.toml with mode 0644") as wrong:
        Kit.load(server_folder, ServerSettings)
    assert "sesame" not in str(wrong.value)

    settings.chmod(0o600)
    assert Kit.load(server_folder, ServerSettings)
