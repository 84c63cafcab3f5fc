import os
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from hanse.errors import ConfigError, Conflict
from hanse.identity.certificates import verify_certificate
from hanse.identity.kits import Kit
from hanse.identity.provision import KitState, approve, install, provision, request
from hanse.identity.servers_secret import ServersSecret
from hanse.settings import AdminSettings, ClientSettings, ServerSettings

from .conftest import NOW

LATER = NOW + timedelta(days=100)
PROJECT = """
name = "demo"
organisation = "House"
[server]
hosts = ["localhost", "127.0.0.1"]
[[clients]]
name = "site-1"
[[clients]]
name = "site-2"
own_key = true
[[admins]]
name = "ada@demo"
role = "lead"
"""
NEWCOMER = '[[clients]]\nname = "site-3"\n'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = tmp_path / "project.toml"
    path.write_text(PROJECT)
    return path


@pytest.fixture
def out(tmp_path: Path, project: Path) -> Path:
    """Kits made from the project."""
    provision(project, tmp_path / "kits", now=NOW)
    return tmp_path / "kits"


def content(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Each file's bytes, mode and time of change: what "untouched" means."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_participant_gets_a_kit_that_loads(out: Path):
    kits = [
        Kit.load(out / "server", ServerSettings),
        Kit.load(out / "site-1", ClientSettings),
        Kit.load(out / "ada@demo", AdminSettings),
    ]

    for kit, role in zip(kits, ["server", "client", "admin:lead"], strict=True):
        assert kit.identity is not None
        holder = verify_certificate(kit.identity.certificate, kit.ca_pem, now=NOW, role_prefix=role)
        assert (holder.name, holder.organisation) == (kit.settings.name, "House")


def test_the_layout_is_the_same_each_time_and_private(out: Path):
    kit = ("ca.pem", "cert.pem", "key.pem", "settings.toml")
    files = content(out)

    assert files.keys() == {
        "authority/ca.key",
        "authority/ca.pem",
        *(f"{name}/{file}" for name in ("server", "site-1", "ada@demo") for file in kit),
    }
    keys = [path for path in files if path.endswith(("key.pem", "ca.key"))]
    assert {files[path][1] & 0o777 for path in keys} == {0o600}
    assert {folder.stat().st_mode & 0o777 for folder in [out, *out.iterdir()]} == {0o700}


def test_the_report_says_what_was_made_until_when_and_what_to_do(tmp_path: Path, project: Path):
    reports = provision(project, tmp_path / "kits", now=NOW)

    assert [(report.name, report.role, report.state) for report in reports] == [
        ("server", "server", KitState.MADE),
        ("site-1", "client", KitState.MADE),
        ("site-2", "client", KitState.AWAITS_REQUEST),
        ("ada@demo", "admin:lead", KitState.MADE),
    ]
    assert reports[0].expires == NOW + timedelta(days=360)
    assert reports[2].expires is None
    assert "hanse kit request" in reports[2].note
    assert len({report.authority for report in reports}) == 1


def test_provisioning_again_changes_nothing(out: Path, project: Path):
    before = content(out)

    reports = provision(project, out, now=LATER)

    assert content(out) == before
    assert {report.state for report in reports} == {KitState.KEPT, KitState.AWAITS_REQUEST}
    assert reports[0].expires == NOW + timedelta(days=360)
    assert reports[0].note == ""


def test_a_newcomer_gets_a_kit_and_the_others_keep_theirs(out: Path, project: Path):
    before = content(out)
    project.write_text(PROJECT + NEWCOMER)

    reports = provision(project, out, now=LATER)

    after = content(out)
    assert {path: after[path] for path in before} == before
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"site-3"}
    assert [report.name for report in reports if report.state is KitState.MADE] == ["site-3"]
    newcomer = Kit.load(out / "site-3", ClientSettings)
    assert newcomer.ca_pem == (out / "server" / "ca.pem").read_bytes()
    assert newcomer.identity is not None
    assert newcomer.identity.expires == LATER + timedelta(days=360)


def test_what_a_site_changed_in_its_kit_stays(out: Path, project: Path):
    settings = out / "site-1" / "settings.toml"
    settings.write_text(settings.read_text() + "# ours\n")

    provision(project, out, now=LATER)

    assert settings.read_text().endswith("# ours\n")


def test_a_kept_kit_that_no_longer_says_what_the_file_says_is_noted(out: Path, project: Path):
    text = PROJECT.replace('"127.0.0.1"', '"127.0.0.1", "fl.example.org"').replace('"lead"', '"member"')
    project.write_text(text)
    before = content(out)

    server, _, _, ada = provision(project, out, now=LATER)

    assert content(out) == before
    assert server.note.startswith("its certificate lacks the hosts fl.example.org; move ")
    assert "is for ada@demo (House, admin:lead), not for ada@demo (House, admin:member)" in ada.note


def test_a_kept_kit_without_its_certificate_is_noted(out: Path, project: Path):
    (out / "site-1" / "cert.pem").unlink()

    assert "certificate file" in provision(project, out, now=LATER)[1].note


def test_a_folder_of_another_project_is_refused_untouched(out: Path, project: Path):
    before = content(out)
    project.write_text(PROJECT.replace('"demo"', '"other"') + NEWCOMER)

    with pytest.raises(ConfigError, match="project name is 'other'"):
        provision(project, out, now=LATER)
    assert content(out) == before


def test_kits_whose_authority_is_gone_are_refused_rather_than_joined_by_strangers(out: Path, project: Path):
    (out / "authority").rename(out.parent / "safe")
    before = content(out)
    project.write_text(PROJECT + NEWCOMER)

    with pytest.raises(ConfigError, match="authority folder"):
        provision(project, out, now=LATER)
    assert content(out) == before


def test_a_mistake_in_the_last_entry_makes_nothing(tmp_path: Path, project: Path):
    project.write_text(PROJECT.replace('"127.0.0.1"', '"127.0.0.1", "no_host"'))

    with pytest.raises(ConfigError, match="hosts is 'no_host'"):
        provision(project, tmp_path / "kits", now=NOW)
    assert content(tmp_path / "kits") == {}


def test_the_lifetime_is_the_files(tmp_path: Path, project: Path):
    project.write_text("valid_days = 7\n" + PROJECT)

    assert provision(project, tmp_path / "kits", now=NOW)[0].expires == NOW + timedelta(days=7)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder at site-2 with its key and request."""
    request("site-2", "House", "client", tmp_path / "site")
    return tmp_path / "site"


def approved(site: Path, out: Path, project: Path, name: str = "approved.zip") -> Path:
    path = out.parent / name
    approve(site / "request.pem", out / "authority", project, path, now=NOW)
    return path


@pytest.mark.parametrize("form", ["approved.zip", "approved"])
def test_request_approve_install_makes_a_kit_whose_key_never_moved(out: Path, project: Path, site: Path, form: str):
    key = content(site)["key.pem"]
    answer = approved(site, out, project, form)
    sent = zipfile.ZipFile(answer).namelist() if answer.suffix else [path.name for path in answer.iterdir()]

    report = install(answer, site)

    kit = Kit.load(site, ClientSettings)
    assert kit.identity is not None
    holder = verify_certificate(kit.identity.certificate, kit.ca_pem, now=NOW, role_prefix="client", name="site-2")
    assert holder.public_key == kit.identity.key.public_key()
    assert kit.ca_pem == (out / "server" / "ca.pem").read_bytes()
    assert sorted(sent) == ["ca.pem", "cert.pem", "settings.toml"]
    assert content(site)["key.pem"] == key
    assert sorted(content(site)) == ["ca.pem", "cert.pem", "key.pem", "request.pem", "settings.toml"]
    assert (report.name, report.state, report.expires) == ("site-2", KitState.INSTALLED, NOW + timedelta(days=360))


def test_site_and_operator_are_shown_the_same_fingerprint(out: Path, project: Path, site: Path):
    at_operator = approve(site / "request.pem", out / "authority", project, out.parent / "a.zip", now=NOW)
    at_site = install(out.parent / "a.zip", site)

    assert at_operator.authority == at_site.authority != ""


def test_a_servers_own_key_is_certified_for_its_hosts(tmp_path: Path, out: Path, project: Path):
    request("server", "House", "server", tmp_path / "s")
    approve(tmp_path / "s" / "request.pem", out / "authority", project, tmp_path / "s.zip", now=NOW)
    install(tmp_path / "s.zip", tmp_path / "s")

    assert Kit.load(tmp_path / "s", ServerSettings).settings.target == "0.0.0.0:6007"


def test_a_request_is_private_and_made_once(site: Path):
    before = content(site)

    assert before.keys() == {"key.pem", "request.pem"}
    assert before["key.pem"][1] & 0o777 == 0o600
    assert site.stat().st_mode & 0o777 == 0o700
    with pytest.raises(Conflict, match="already made"):
        request("site-2", "House", "client", site)
    assert content(site) == before


def test_an_interrupted_request_goes_on_with_the_key_that_is_there(site: Path):
    key = content(site)["key.pem"]
    (site / "request.pem").unlink()

    request("site-2", "House", "client", site)

    assert content(site)["key.pem"] == key


def test_a_request_that_could_never_be_approved_is_refused_at_once(tmp_path: Path):
    with pytest.raises(ConfigError, match="role is 'boss'"):
        request("site-2", "House", "boss", tmp_path / "site")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("name", "organisation", "role", "problem"),
    [
        ("site-9", "House", "client", "the request's name is 'site-9'"),
        (
            "site-2",
            "Elsewhere",
            "client",
            r"subject is 'site-2 \(Elsewhere, client\)'; expected 'site-2 \(House, client\)'",
        ),
        ("site-2", "House", "admin:admin", r"subject is 'site-2 \(House, admin:admin\)'"),
        ("site-2", "House", "server", r"subject is 'site-2 \(House, server\)'"),
    ],
)
def test_a_request_for_what_the_file_does_not_list_is_refused(
    tmp_path: Path, out: Path, project: Path, name: str, organisation: str, role: str, problem: str
):
    request(name, organisation, role, tmp_path / "x")

    with pytest.raises(ConfigError, match=problem):
        approve(tmp_path / "x" / "request.pem", out / "authority", project, tmp_path / "x.zip", now=NOW)
    assert not (tmp_path / "x.zip").exists()


def test_what_is_made_outlives_a_power_failure_once_it_is_told_of(
    tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
):
    named: dict[Path, bool] = {}  # each name that was given to something, and whether its folder was synced since
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def noting(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(source: Path, target: Path) -> Path:
            named[target] = False
            return move(source, target)

        return moved

    def synced(descriptor: int) -> None:
        at = Path(f"/proc/self/fd/{descriptor}").readlink()
        named.update({name: True for name in named if name.parent == at})
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", noting(rename))
    monkeypatch.setattr(Path, "replace", noting(replace))

    out, site = tmp_path / "kits", tmp_path / "their-machine" / "site-2"
    provision(project, out, now=NOW)
    request("site-2", "House", "client", site)
    install(approved(site, out, project), site)

    assert {out / "site-1", out / "authority" / "ca.key", out / "authority" / "ca.pem", site / "cert.pem"} <= set(named)
    assert [str(name) for name, is_synced in named.items() if not is_synced] == []


def test_an_answer_is_never_written_over(out: Path, project: Path, site: Path):
    answer = approved(site, out, project)
    before = answer.read_bytes()

    with pytest.raises(Conflict, match="already there"):
        approved(site, out, project)
    assert answer.read_bytes() == before


def test_an_authority_of_another_project_does_not_approve(out: Path, project: Path, site: Path):
    project.write_text(PROJECT.replace('"demo"', '"other"'))

    with pytest.raises(ConfigError, match="project name"):
        approved(site, out, project)


def test_an_answer_for_another_key_is_refused_and_the_folder_unchanged(
    tmp_path: Path, out: Path, project: Path, site: Path
):
    request("site-2", "House", "client", tmp_path / "other")
    before = content(tmp_path / "other")

    with pytest.raises(ConfigError, match=r"approved.zip'; expected a certificate for the key in .*other/key.pem"):
        install(approved(site, out, project), tmp_path / "other")
    assert content(tmp_path / "other") == before


def test_an_answer_that_does_not_hold_together_is_refused_and_the_folder_unchanged(
    tmp_path: Path, out: Path, project: Path, site: Path
):
    answer = approved(site, out, project, "approved")
    settings = answer / "settings.toml"
    settings.write_text(settings.read_text().replace("site-2", "site-1"))
    before = content(site)

    with pytest.raises(ConfigError, match="name is 'site-1'"):
        install(answer, site)
    assert content(site) == before


@pytest.mark.parametrize("damage", ["truncated", "no zip", "too large", "a file less", "nothing there"])
def test_an_answer_that_is_not_one_is_refused(out: Path, project: Path, site: Path, damage: str):
    answer = approved(site, out, project)
    before = content(site)
    match damage:
        case "truncated":
            answer.write_bytes(answer.read_bytes()[:-50])
        case "no zip":
            answer.write_bytes(b"hello")
        case "nothing there":
            answer.unlink()
        case "too large" | "a file less":
            with zipfile.ZipFile(answer) as archive:
                files = {name: archive.read(name) for name in archive.namelist()}
            files["ca.pem"] += b"\n" * 300_000
            if damage == "a file less":
                del files["ca.pem"]
            with zipfile.ZipFile(answer, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in files.items():
                    archive.writestr(name, data)

    with pytest.raises(ConfigError, match=r"approved kit is .*as 'hanse kit approve' makes it"):
        install(answer, site)
    assert content(site) == before


def test_a_later_answer_renews_the_certificate_and_keeps_the_sites_settings(out: Path, project: Path, site: Path):
    install(approved(site, out, project), site)
    settings = site / "settings.toml"
    settings.write_text(settings.read_text() + "# ours\n")

    approve(site / "request.pem", out / "authority", project, out.parent / "later.zip", now=LATER)
    report = install(out.parent / "later.zip", site)

    assert report.expires == LATER + timedelta(days=360)
    assert report.note == "the settings.toml that was there stays"
    assert settings.read_text().endswith("# ours\n")
    assert Kit.load(site, ClientSettings).identity is not None


def test_an_answer_of_a_new_authority_is_noted(tmp_path: Path, out: Path, project: Path, site: Path):
    install(approved(site, out, project), site)
    provision(project, tmp_path / "anew", now=NOW)

    report = install(approved(site, tmp_path / "anew", project, "anew.zip"), site)

    assert "the project's authority is another than before" in report.note
    assert Kit.load(site, ClientSettings).ca_pem == (tmp_path / "anew" / "authority" / "ca.pem").read_bytes()


def test_equal_answers_have_equal_bytes_but_for_the_certificate(out: Path, project: Path, site: Path):
    with zipfile.ZipFile(approved(site, out, project)) as archive:
        assert [info.date_time for info in archive.infolist()] == [(1980, 1, 1, 0, 0, 0)] * 3
        assert archive.namelist() == sorted(archive.namelist())


SHARED = 'settings = { store = "postgresql://hanse@db/hanse", runs = "/shared/runs" }\n'
STANDBY = '[[standbys]]\nname = "standby"\nhosts = ["127.0.0.2"]\n'
TWO_SERVERS = PROJECT.replace("[[clients]]", SHARED + STANDBY + "[[clients]]", 1)


@pytest.fixture
def two(tmp_path: Path, project: Path) -> Path:
    """Kits of a project with a standby."""
    project.write_text(TWO_SERVERS)
    provision(project, tmp_path / "two", now=NOW)
    return tmp_path / "two"


def secrets_in(out: Path) -> dict[str, bytes]:
    return {str(path.parent.relative_to(out)): path.read_bytes() for path in out.rglob("servers.secret")}


def test_all_servers_kits_and_the_authority_have_one_secret_and_nobody_else_has_it(two: Path):
    secrets = secrets_in(two)

    assert secrets.keys() == {"authority", "server", "standby"}
    assert len(set(secrets.values())) == 1
    assert {path.stat().st_mode & 0o777 for path in two.rglob("servers.secret")} == {0o600}
    for name in ("server", "standby"):
        kit = Kit.load(two / name, ServerSettings)
        assert kit.servers_secret == two / name / "servers.secret"
        assert kit.settings.runs == "/shared/runs"
        assert kit.identity is not None
        assert kit.identity.role == "server"
    assert Kit.load(two / "site-1", ClientSettings).settings.server_names == ("server", "standby")


def test_a_server_alone_has_no_secret(out: Path):
    assert secrets_in(out) == {}


def test_settings_are_private_since_they_may_hold_a_password(two: Path):
    assert {path.stat().st_mode & 0o777 for path in two.rglob("settings.toml")} == {0o600}


def test_provisioning_several_servers_again_changes_nothing(two: Path, project: Path):
    before = content(two)

    reports = provision(project, two, now=LATER)

    assert content(two) == before
    assert [report.note for report in reports if report.state is KitState.KEPT] == [""] * 4


def test_another_standby_later_gets_the_same_secret_and_kept_kits_are_noted(two: Path, project: Path):
    before = content(two)
    third = STANDBY.replace('"standby"', '"third"').replace("127.0.0.2", "127.0.0.3")
    project.write_text(TWO_SERVERS + third)

    notes = {report.name: report.note for report in provision(project, two, now=LATER)}

    after = content(two)
    assert {path: after[path] for path in before} == before
    assert secrets_in(two)["third"] == secrets_in(two)["server"]
    assert notes["server"] == notes["standby"] == notes["third"] == ""
    assert notes["site-1"] == notes["ada@demo"]
    assert notes["site-1"].startswith('it does not know third: write servers = ["localhost:6007", "127.0.0.1:6007", ')


def test_the_first_standby_later_tells_what_the_server_lacks(out: Path, project: Path):
    before = content(out)
    project.write_text(TWO_SERVERS)

    notes = {report.name: report.note for report in provision(project, out, now=LATER)}

    after = content(out)
    assert {path: after[path] for path in before} == before
    assert secrets_in(out).keys() == {"authority", "standby"}
    kit, settings = out / "server", out / "server" / "settings.toml"
    assert notes["server"].startswith(f"it lacks the servers' secret: copy {out}/authority/servers.secret to {kit}/")
    (kit / "servers.secret").write_bytes((out / "authority" / "servers.secret").read_bytes())
    (kit / "servers.secret").chmod(0o600)
    settings.write_text(settings.read_text() + 'store = "postgresql://hanse@db/hanse"\nruns = "/shared/runs"\n')
    assert Kit.load(kit, ServerSettings).servers_secret == kit / "servers.secret"
    assert provision(project, out, now=LATER)[0].note == ""


def test_what_a_note_tells_a_client_to_write_makes_it_know_all_servers(out: Path, project: Path):
    project.write_text(TWO_SERVERS)
    note = provision(project, out, now=LATER)[2].note
    servers, names = note.removeprefix("it does not know standby: write ").split(" to its ")[0].split(" and ")
    settings = out / "site-1" / "settings.toml"
    kept = [line for line in settings.read_text().splitlines() if not line.startswith("server")]

    settings.write_text("\n".join([*kept, servers, names]))

    assert Kit.load(out / "site-1", ClientSettings).settings.servers[-1] == "127.0.0.2:6007"
    assert provision(project, out, now=LATER)[2].note == ""


def test_a_kept_kit_whose_settings_do_not_hold_is_noted(out: Path, project: Path):
    settings = out / "site-1" / "settings.toml"
    settings.write_text(settings.read_text() + "sever_names = 1\n")

    assert "perhaps 'server_names' is meant" in provision(project, out, now=LATER)[1].note


def test_a_server_with_another_secret_is_noted(two: Path, project: Path):
    ServersSecret.new().save(two / "standby" / "servers.secret")
    assert provision(project, two, now=LATER)[1].note.startswith("it lacks the servers' secret: copy")

    (two / "standby" / "servers.secret").write_text("damaged")
    assert "expected 64 hexadecimal digits" in provision(project, two, now=LATER)[1].note


def test_a_secret_that_the_authority_has_lost_is_not_made_anew_beside_the_old_one(two: Path, project: Path):
    (two / "authority" / "servers.secret").unlink()
    project.write_text(TWO_SERVERS + NEWCOMER)
    before = content(two)

    with pytest.raises(ConfigError, match=r"servers' secret is 'no .*authority/servers.secret'; expected the one that"):
        provision(project, two, now=LATER)
    assert content(two) == before


@pytest.fixture
def own_key_standby(tmp_path: Path, project: Path, two: Path) -> Path:
    """A standby's folder with key and request, in a project with two servers."""
    project.write_text(TWO_SERVERS.replace(STANDBY, STANDBY + "own_key = true\n"))
    request("standby", "House", "server", tmp_path / "standby")
    return tmp_path / "standby"


@pytest.mark.parametrize("form", ["approved.zip", "approved"])
def test_a_server_with_its_own_key_gets_the_secret_in_its_answer(
    two: Path, project: Path, own_key_standby: Path, form: str
):
    answer = two.parent / form
    told = approve(own_key_standby / "request.pem", two / "authority", project, answer, now=NOW)
    assert told.note == f"{answer} holds the servers' secret: hand it over on a way that nobody else can read"
    assert answer.stat().st_mode & 0o077 == 0

    install(answer, own_key_standby)

    kit = Kit.load(own_key_standby, ServerSettings)
    assert kit.servers_secret is not None
    assert kit.servers_secret.read_bytes() == secrets_in(two)["authority"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in own_key_standby.iterdir()}
    private = {name for name, mode in modes.items() if mode == 0o600}
    assert private == {"key.pem", "servers.secret", "settings.toml"}


def test_a_later_answer_with_another_secret_is_noted(two: Path, project: Path, own_key_standby: Path):
    install(approved(own_key_standby, two, project), own_key_standby)
    assert install(approved(own_key_standby, two, project, "again.zip"), own_key_standby).note == (
        "the settings.toml that was there stays"
    )

    ServersSecret.new().save(two / "authority" / "servers.secret")
    report = install(approved(own_key_standby, two, project, "later.zip"), own_key_standby)

    assert "the servers' secret is another than before: all servers need this one" in report.note
    assert (own_key_standby / "servers.secret").read_bytes() == secrets_in(two)["authority"]


def test_an_answer_with_a_secret_needs_settings_that_share_and_changes_nothing_without(
    tmp_path: Path, out: Path, project: Path
):
    folder = tmp_path / "s"
    request("server", "House", "server", folder)
    install(approved(folder, out, project), folder)
    project.write_text(TWO_SERVERS)
    provision(project, out, now=LATER)
    before = content(folder)

    with pytest.raises(ConfigError, match="store is ''; expected what the project's servers share"):
        install(approved(folder, out, project, "later.zip"), folder)
    assert content(folder) == before


def test_a_server_is_not_approved_before_there_is_a_secret(tmp_path: Path, out: Path, project: Path):
    request("standby", "House", "server", tmp_path / "standby")
    project.write_text(TWO_SERVERS)

    with pytest.raises(ConfigError, match=r"no .*servers.secret'; expected what 'hanse provision' makes there"):
        approved(tmp_path / "standby", out, project)
    assert not (out.parent / "approved.zip").exists()


def test_a_clients_answer_has_no_secret(two: Path, project: Path, site: Path):
    answer = approved(site, two, project)

    assert zipfile.ZipFile(answer).namelist() == ["ca.pem", "cert.pem", "settings.toml"]
