import json
import zipfile
from pathlib import Path

import pytest

from hanse.identity.kits import Kit
from hanse.settings import ClientSettings

from .conftest import Hanse

PROJECT = """
name = "demo"
[server]
hosts = ["localhost"]
[[clients]]
name = "site-1"
[[clients]]
name = "site-2"
organisation = "St. Mary's"
own_key = true
[[admins]]
name = "ada@demo"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project.toml").write_text(PROJECT)
    return tmp_path


def test_provisioning_says_what_was_made_and_what_was_kept(hanse: Hanse, folder: Path) -> None:
    made = json.loads(hanse("provision", folder / "project.toml", "--out", folder / "kits", "--format", "json").out)
    states = {kit["name"]: kit["state"] for kit in made["kits"]}
    assert states == {"server": "made", "site-1": "made", "site-2": "awaits request", "ada@demo": "made"}
    again = hanse("provision", folder / "project.toml", "--out", folder / "kits")
    assert again.status == 0
    assert "made" not in again.out.replace("request", "")
    assert made["kits"][0]["authority"] in again.out
    assert "site-2: site-2 makes its own key" in again.out


def test_a_second_server_is_provisioned_and_its_answer_called_confidential(hanse: Hanse, folder: Path) -> None:
    shared = 'settings = { store = "postgresql://hanse@db/hanse", runs = "/shared/runs" }'
    standby = f'{shared}\n[[standbys]]\nname = "standby"\nhosts = ["127.0.0.1"]\nown_key = true'
    (folder / "project.toml").write_text(PROJECT.replace('hosts = ["localhost"]', f'hosts = ["localhost"]\n{standby}'))
    made = hanse("provision", folder / "project.toml", "--out", folder / "kits")
    assert "standby: standby makes its own key" in made.out
    request = ("kit", "request", "standby", "--organisation", "demo", "--role", "server", "--out", folder / "standby")
    assert hanse(*request).status == 0

    approve = ("kit", "approve", folder / "standby" / "request.pem", "--project", folder / "project.toml")
    approved = hanse(*approve, "--authority", folder / "kits" / "authority", "--out", folder / "standby.zip")

    assert "hand it over on a way that nobody else can read" in approved.out
    assert hanse("kit", "install", folder / "standby.zip", "--into", folder / "standby").status == 0
    secret = (folder / "kits" / "authority" / "servers.secret").read_bytes()
    assert (folder / "standby" / "servers.secret").read_bytes() == secret
    assert secret.decode().strip() not in made.out + approved.out


def test_a_key_that_never_leaves_its_site_gets_its_certificate(hanse: Hanse, folder: Path) -> None:
    hanse("provision", folder / "project.toml", "--out", folder / "kits")
    site, answer = folder / "site-2", folder / "site-2.zip"
    assert hanse("kit", "request", "site-2", "--organisation", "St. Mary's", "--out", site).status == 0
    approve = ("kit", "approve", site / "request.pem", "--project", folder / "project.toml")
    approved = hanse(*approve, "--authority", folder / "kits" / "authority", "--out", answer)
    assert approved.status == 0, approved.err
    assert "key.pem" not in zipfile.ZipFile(answer).namelist()
    installed = hanse("kit", "install", answer, "--into", site, "--format", "json")
    assert json.loads(installed.out)["kits"][0]["state"] == "installed"
    assert Kit.load(site, ClientSettings).settings.name == "site-2"


def test_a_request_is_made_in_a_folder_called_like_the_participant(
    hanse: Hanse, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert hanse("kit", "request", "site-2", "--organisation", "St. Mary's").status == 0
    assert (folder / "site-2" / "request.pem").exists()
    again = hanse("kit", "request", "site-2", "--organisation", "St. Mary's")
    assert again.status == 4


def test_a_project_that_does_not_hold_is_one_sentence(hanse: Hanse, folder: Path) -> None:
    (folder / "project.toml").write_text(PROJECT.replace("hosts", "host"))
    ended = hanse("provision", folder / "project.toml", "--out", folder / "kits")
    assert ended.status == 2
    assert "host" in ended.err
    assert not (folder / "kits").exists()


@pytest.mark.parametrize(
    ("command", "kit", "wanted", "this"),
    [
        (("client", "start"), "server", "a client's", "a server's"),
        (("client", "stop"), "ada@demo", "a client's", "an administrator's"),
        (("server", "start"), "site-1", "a server's", "a client's"),
        (("job", "list", "--kit"), "server", "an administrator's", "a server's"),
    ],
)
def test_a_kit_of_the_wrong_kind_is_one_sentence(
    hanse: Hanse, folder: Path, command: tuple[str, ...], kit: str, wanted: str, this: str
) -> None:
    hanse("provision", folder / "project.toml", "--out", folder / "kits")
    ended = hanse(*command, folder / "kits" / kit)
    assert ended.status == 2
    assert ended.err == f"hanse: kit is '{folder / 'kits' / kit}'; expected {wanted}, and this one is {this} [config]\n"
