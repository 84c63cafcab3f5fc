import math
import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.errors import ConfigError
from hanse.identity import project as project_module
from hanse.identity.project import AdminEntry, ClientEntry, Participant, Project, ServerEntry
from hanse.settings import AdminSettings, ClientSettings, ServerSettings, SitePolicy, read

DEMO = """
name = "demo"
organisation = "House"

[server]
hosts = ["fl.example.org", "10.0.0.7", "0:0::1", "*.example.org"]
port = 7000
organisation = "Hosting"
settings = { heartbeat_s = 1.5, min_num_clients = 3 }

[[clients]]
name = "site-1"
organisation = "Site One"
config = { data = "/srv/data", share = 0.25, shuffle = true }
settings = { policy = { job_code = "deny" } }

[[clients]]
name = "site-2"
own_key = true

[[admins]]
name = "ada@demo"
role = "lead"
"""


def loaded(tmp_path: Path, text: str) -> Project:
    (tmp_path / "project.toml").write_text(text)
    return read(tmp_path / "project.toml", Project)


def settings_of(participant: Participant) -> msgspec.Struct:
    return msgspec.convert(tomllib.loads(participant.settings_text()), participant.kind)


def test_the_example_in_the_documentation_holds(tmp_path: Path):
    assert project_module.__doc__ is not None
    example = "\n".join(line[4:] for line in project_module.__doc__.splitlines() if line.startswith("    "))

    assert [one.name for one in loaded(tmp_path, example).participants()] == ["server", "site-1", "ada@demo"]


def test_participants_come_in_the_files_order_with_role_and_organisation(tmp_path: Path):
    participants = list(loaded(tmp_path, DEMO).participants())

    assert [str(one.subject) for one in participants] == [
        "server (Hosting, server)",
        "site-1 (Site One, client)",
        "site-2 (House, client)",
        "ada@demo (House, admin:lead)",
    ]
    assert [one.own_key for one in participants] == [False, False, True, False]


def test_settings_hold_what_each_needs_to_meet_the_others(tmp_path: Path):
    server, site, _, ada = loaded(tmp_path, DEMO).participants()
    servers = ("fl.example.org:7000", "10.0.0.7:7000", "[::1]:7000")

    assert settings_of(server) == ServerSettings(
        project="demo",
        target="0.0.0.0:7000",
        address="fl.example.org:7000",
        heartbeat_s=1.5,
        min_num_clients=3,
    )
    assert settings_of(site) == ClientSettings(
        project="demo",
        name="site-1",
        servers=servers,
        config={"data": "/srv/data", "share": 0.25, "shuffle": True},
        policy=SitePolicy(job_code="deny"),
    )
    assert settings_of(ada) == AdminSettings(project="demo", name="ada@demo", servers=servers)


def test_a_server_can_listen_on_one_address_only(tmp_path: Path):
    text = 'name = "demo"\n[server]\nname = "alpha"\nhosts = ["::1"]\nlisten = "::1"\n[[clients]]\nname = "site-1"\n'
    server, site = loaded(tmp_path, text).participants()

    assert settings_of(server) == ServerSettings(
        project="demo", name="alpha", target="[::1]:6007", address="[::1]:6007"
    )
    assert settings_of(site) == ClientSettings(
        project="demo", name="site-1", servers=("[::1]:6007",), server_names=("alpha",)
    )


SHARED = "settings = { store = 'postgresql://hanse@db/hanse', runs = '/shared/runs', max_num_clients = 50 }\n"
TWO_SERVERS = (
    'name = "demo"\n[server]\nhosts = ["a.example.org", "10.0.0.7"]\n'
    + SHARED
    + """
[[standbys]]
name = "standby"
hosts = ["b.example.org"]
port = 7000
listen = "10.0.0.8"
own_key = true
settings = { max_num_clients = 60, heartbeat_s = 2.0 }

[[clients]]
name = "site-1"

[[admins]]
name = "ada@demo"
"""
)


def test_servers_share_settings_and_clients_know_all_of_them(tmp_path: Path):
    server, standby, site, ada = loaded(tmp_path, TWO_SERVERS).participants()
    shared = {"project": "demo", "store": "postgresql://hanse@db/hanse", "runs": "/shared/runs"}

    assert settings_of(server) == ServerSettings(
        **shared, target="0.0.0.0:6007", address="a.example.org:6007", max_num_clients=50
    )
    assert settings_of(standby) == ServerSettings(
        **shared,
        name="standby",
        target="10.0.0.8:7000",
        address="b.example.org:7000",
        max_num_clients=60,
        heartbeat_s=2.0,
    )
    for one, kind in [(site, ClientSettings), (ada, AdminSettings)]:
        assert settings_of(one) == kind(
            project="demo",
            name=one.name,
            servers=("a.example.org:6007", "10.0.0.7:6007", "b.example.org:7000"),
            server_names=("server", "standby"),
        )


def test_a_standby_is_a_server_of_its_own(tmp_path: Path):
    server, standby, site, ada = loaded(tmp_path, TWO_SERVERS).participants()

    assert str(standby.subject) == "standby (demo, server)"
    assert standby.hosts == ("b.example.org",)
    assert (server.own_key, standby.own_key) == (False, True)
    assert [one.shares_secret for one in (server, standby, site, ada)] == [True, True, False, False]


def test_a_server_alone_shares_nothing_wherever_its_store_is(tmp_path: Path):
    (server,) = loaded(tmp_path, 'name = "demo"\n[server]\nhosts = ["h"]\n' + SHARED).participants()

    assert not server.shares_secret


@pytest.mark.parametrize(
    ("here", "there", "problem"),
    [
        ('"standby"', '"server"', "^name is 'server'; expected a name that nothing else in the project has"),
        ('"standby"', '"site-1"', "^name is 'site-1'"),
        ("b.example.org", "b example.org", r"^standbys\[0\].hosts is"),
        (
            'hosts = ["b.example.org"]\nport = 7000',
            'hosts = ["10.0.0.7"]',
            r"^standbys\[0\].hosts and port is '10.0.0.7:6",
        ),
        ('hosts = ["b.example.org"]', "hosts = []", r"^standbys\[0\].hosts is"),
        ("port = 7000", "port = 0", r"^standbys\[0\].port is 0"),
        ("port = 7000", "ports = 7000", r"^standbys\[0\].ports is 7000; expected no such field"),
        ("max_num_clients = 60", "max_num_clients = 1", "^settings.min_num_clients of standby is 2"),
        (
            "max_num_clients = 60",
            "runs = ''",
            "^settings.runs of standby is ''; expected the runs that all servers share",
        ),
        ("runs = '/shared/runs', ", "", "^settings.runs of server is None; expected the runs that all servers share"),
        (
            "store = 'postgresql://hanse@db/hanse', ",
            "",
            "^settings.store of server is None; expected the store that all",
        ),
        ("'/shared/runs'", "'runs'", "^settings.runs of server is 'runs'; expected a folder or bucket that all"),
        ("'/shared/runs'", "'a/../.'", "^settings.runs of server is '.'; expected a folder or bucket that all"),
        ("postgresql://hanse", "postgres://hanse:sesame", "^settings.store of server is 'postgres:…'"),
    ],
)
def test_a_mistake_about_several_servers_is_named(tmp_path: Path, here: str, there: str, problem: str):
    assert here in TWO_SERVERS
    with pytest.raises(ConfigError) as wrong:
        loaded(tmp_path, TWO_SERVERS.replace(here, there, 1))
    sentence = str(wrong.value).replace(f" in {wrong.value.where}", "")
    assert re.search(problem, sentence), sentence
    assert "sesame" not in sentence


@pytest.mark.parametrize("runs", ["/shared/runs", "../runs", "../../shared", "s3://hanse-demo/runs"])
def test_runs_may_lie_beside_the_kits_or_in_a_bucket(tmp_path: Path, runs: str):
    assert loaded(tmp_path, TWO_SERVERS.replace("/shared/runs", runs))


def test_settings_text_is_made_for_people(tmp_path: Path):
    _, site, _, _ = loaded(tmp_path, DEMO).participants()

    assert site.settings_text() == (
        "# Settings of site-1 (client) in the project demo.\n"
        "# What is left out has its default. Relative paths start at this file's folder.\n"
        "\n"
        "# The project, and the name under which you take part in it: as in the certificate.\n"
        'project = "demo"\n'
        'name = "site-1"\n'
        "\n"
        "# Where servers listen: host:port, tried in order.\n"
        'servers = ["fl.example.org:7000", "10.0.0.7:7000", "[::1]:7000"]\n'
        "\n"
        "# The names of the project's servers; a certificate must prove one of them.\n"
        'server_names = ["server"]\n'
        "\n"
        "# What training code may read of this site, as ctx.site.\n"
        "[config]\n"
        'data = "/srv/data"\n'
        "share = 0.25\n"
        "shuffle = true\n"
        "\n"
        "# What jobs may do here; the site's word is the last.\n"
        "[policy]\n"
        'job_code = "deny"\n'
    )


SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(), SCALARS, max_size=5))
def test_any_site_configuration_survives_its_file(config: dict[str, object]):
    entry = ClientEntry(name="site-1", config=config)
    _, site = Project(name="demo", server=ServerEntry(hosts=("localhost",)), clients=(entry,)).participants()

    settings = settings_of(site)

    assert isinstance(settings, ClientSettings)
    assert settings.config == config


def test_a_number_that_is_none_survives_too():
    entry = ClientEntry(name="site-1", config={"x": math.nan})
    _, site = Project(name="demo", server=ServerEntry(hosts=("localhost",)), clients=(entry,)).participants()

    assert "x = nan" in site.settings_text()


SERVER = '[server]\nhosts = ["localhost"]\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (SERVER, "^name is None; expected a value"),
        ('name = "demo"', "^server is None; expected a value"),
        ('name = "a.b"\n' + SERVER, "name is 'a.b'"),
        ('name = "demo"\nclient = 1\n' + SERVER, "^client is 1; expected no such field"),
        ('name = "demo"\n' + SERVER + "ports = 1", r"^server\.ports is 1; expected no such field"),
        ('name = "demo"\n' + SERVER + "port = 0", "server.port is 0"),
        ('name = "demo"\n' + SERVER + "port = 65536", "server.port is 65536"),
        ('name = "demo"\nvalid_days = 0\n' + SERVER, "valid_days is 0"),
        ('name = "demo"\nvalid_days = 4000\n' + SERVER, "valid_days is 4000"),
        ('name = "demo"\n[server]\nhosts = []', "server.hosts"),
        ('name = "demo"\n[server]\nhosts = ["*.example.org"]', "server.hosts"),
        ('name = "demo"\n' + SERVER + '[[clients]]\nname = "a"\n[[clients]]\nname = "A"', "name is 'A'"),
        ('name = "demo"\n' + SERVER + '[[clients]]\nname = "a"\n[[admins]]\nname = "a"', "name is 'a'"),
        ('name = "demo"\n' + SERVER + '[[clients]]\nname = "authority"', "name is 'authority'"),
        ('name = "demo"\n' + SERVER + 'name = "alpha"\n[[clients]]\nname = "server"', "name is 'server'"),
        ('name = "demo"\n' + SERVER + '[[admins]]\nname = "Server"', "name is 'Server'"),
        ('name = "demo"\n' + SERVER + '[[clients]]\nname = "../x"', "name is '../x'"),
        ('name = "demo"\n' + SERVER + '[[clients]]\nname = "a"\norganisation = "%s"' % ("x" * 65), "organisation is"),
        ('name = "demo"\n' + SERVER + '[[admins]]\nname = "a"\nrole = "boss"', r"admins\[0\].role is 'boss'"),
        ('name = "demo"\n' + SERVER + "settings = { heartbeat_s = 0 }", "settings.heartbeat_s of server is 0"),
        (
            'name = "demo"\n' + SERVER + "settings = { beat = 1 }",
            "settings.beat of server is 1; expected no such field",
        ),
        ('name = "demo"\n' + SERVER + "settings = { address = 'a:1' }", "settings.address of server .* nothing"),
        ('name = "demo"\n[server]\nhosts = ["0.0.0.0"]', "server.hosts is '0.0.0.0'; expected hosts that clients can"),
        ('name = "demo"\n[server]\nhosts = ["a b"]', "server.hosts is 'a b'; expected hosts that clients can dial"),
        ('name = "demo"\n' + SERVER + "settings = { name = 'x' }", "settings.name of server is 'x'; expected nothing"),
        ('name = "demo"\n' + SERVER + "[[clients]]\nname = 'a'\nconfig = { x = [1] }", r"clients\[0\].config"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, text: str, problem: str):
    with pytest.raises(ConfigError) as wrong:
        loaded(tmp_path, text)
    sentence = str(wrong.value).replace(f" in {wrong.value.where}", "")
    assert re.search(problem, sentence, re.IGNORECASE), sentence


def test_admins_can_do_everything_unless_said_otherwise():
    assert AdminEntry(name="ada").role == "admin"
