"""Settings files: what they mean when they hold, and which field is named when they do not."""

import ast
import inspect
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from hanse import settings
from hanse.errors import ConfigError
from hanse.job import Resources
from hanse.settings import AdminSettings, ClientSettings, ServerSettings, SitePolicy, read

CLIENT = 'project = "demo"\nname = "site-1"\nservers = ["localhost:6007"]\n'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


def test_a_servers_file_needs_only_its_project(file: Path) -> None:
    file.write_text('project = "demo"\n')

    assert read(file, ServerSettings) == ServerSettings(project="demo")


def test_the_contracts_defaults_are_kept() -> None:
    server = ServerSettings(project="demo")

    assert (server.name, server.target, server.min_num_clients) == ("server", "0.0.0.0:6007", 2)
    assert (server.heartbeat_s, server.heart_beat_timeout_s, server.shutdown_period_s) == (5.0, 600.0, 30.0)
    assert server.tls
    assert server.client_certificates


def test_a_client_is_lost_after_three_heartbeats_unless_said_otherwise() -> None:
    assert ServerSettings(project="demo", heartbeat_s=2).lost_after == 6
    assert ServerSettings(project="demo", heartbeat_s=2, lost_after_s=1).lost_after == 1


@pytest.mark.parametrize(
    "store", ["", "postgresql://hanse@db/hanse", "postgresql:///?service=hanse", "sqlite:////shared/store.db"]
)
def test_a_servers_file_names_its_store_by_url(file: Path, store: str) -> None:
    file.write_text(f'project = "demo"\nstore = "{store}"\nruns = "/shared/runs"\n')

    settings = read(file, ServerSettings)

    assert (settings.store, settings.runs, settings.lease_s) == (store, "/shared/runs", 4.0)
    assert not settings.has_password


@pytest.mark.parametrize(
    "store",
    [
        "postgresql://hanse:pw@db/hanse",
        "postgresql://hanse:p/w@db/hanse",  # taken for a password as it stands
        "postgresql://hanse:[pw@db/hanse",
        "postgresql://db/hanse?password=pw",
    ],
)
def test_a_password_in_the_stores_url_is_noticed(store: str) -> None:
    assert ServerSettings(project="demo", store=store).has_password


def test_a_store_that_cannot_be_is_refused_without_showing_its_password(file: Path) -> None:
    file.write_text('project = "demo"\nstore = "postgres://hanse:sesame@db/hanse"\n')

    with pytest.raises(ConfigError, match=r"^store in .* is 'postgres:…'") as wrong:
        read(file, ServerSettings)
    assert "sesame" not in str(wrong.value)


@pytest.mark.parametrize("runs", ["s3://hanse", "s3://my.hanse-1/demo/runs_2/", "s3://hanse/A.b"])
def test_runs_may_be_in_a_bucket_and_are_then_in_no_folder(runs: str) -> None:
    settings = ServerSettings(project="demo", runs=runs)
    assert (settings.bucket, settings.runs_folder) == (runs, "")


@pytest.mark.parametrize("runs", ["", "runs", "/shared/runs", "s3:/hanse"])
def test_runs_that_are_no_url_are_a_folder(runs: str) -> None:
    settings = ServerSettings(project="demo", runs=runs)
    assert (settings.bucket, settings.runs_folder) == ("", runs)


@pytest.mark.parametrize(
    "runs",
    [
        "s3://",
        "s3://b",
        "s3:///runs",
        "s3://Hanse/runs",
        "s3://hanse//runs",
        "s3://hanse/../runs",
        "s3://key:sesame@hanse/runs",
        "s3://hanse/runs?secret=sesame",
        "gs://hanse-sesame",
        "https://hanse.s3.amazonaws.com/sesame",
    ],
)
def test_a_bucket_that_cannot_be_is_refused_without_showing_what_may_be_a_key(runs: str) -> None:
    with pytest.raises(ConfigError, match=rf"^runs is '{runs.partition(':')[0]}://…'; expected a folder") as wrong:
        ServerSettings(project="demo", runs=runs)
    assert "sesame" not in str(wrong.value)


@pytest.mark.parametrize(
    ("address", "listens_at", "reached_at"),
    [
        ("fl.example.org:443", "0.0.0.0:6007", "fl.example.org:443"),
        ("", "10.0.0.7:6007", "10.0.0.7:6007"),
        ("", "localhost:6007", "localhost:6007"),
        ("", "0.0.0.0:6007", ""),
        ("", "[::]:6007", ""),
        ("", "127.0.0.1:0", ""),
        ("", "nowhere", ""),
    ],
)
def test_clients_reach_a_server_where_it_says_or_listens(address: str, listens_at: str, reached_at: str) -> None:
    assert ServerSettings(project="demo", address=address).reached_at(listens_at) == reached_at


def test_a_clients_file_can_say_everything(file: Path) -> None:
    file.write_text(
        CLIENT + 'server_names = ["hub", "spare"]\nworkspace = "/data"\ntls = false\n'
        '[config]\ndata = "/mnt"\nshare = 3\n'
        "[resources]\ncpus = 4\nmemory_mb = 8000\ngpus = 1\n"
        '[policy]\njob_code = "deny"\nsubmitters = ["ada@demo"]\nmax_update_norm = 1.5\n'
    )

    assert read(file, ClientSettings) == ClientSettings(
        project="demo",
        name="site-1",
        servers=("localhost:6007",),
        server_names=("hub", "spare"),
        workspace="/data",
        tls=False,
        config={"data": "/mnt", "share": 3},
        resources=Resources(4, 8000, 1),
        policy=SitePolicy(job_code="deny", submitters=("ada@demo",), max_update_norm=1.5),
    )


def test_an_administrators_file_names_servers(file: Path) -> None:
    file.write_text('project = "demo"\nname = "ada@demo"\nservers = ["h:1", "[::1]:2"]\n')

    assert read(file, AdminSettings).servers == ("h:1", "[::1]:2")


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("name", 'name = "two words"'),
        ("name", 'name = "../x"'),
        ("name", "name = 3"),
        ("min_num_clients", "min_num_clients = 0"),
        ("min_num_clients", "min_num_clients = 5\nmax_num_clients = 4"),
        ("max_running_jobs", "max_running_jobs = 0"),
        ("heartbeat_s", "heartbeat_s = 0"),
        ("heartbeat_s", "heartbeat_s = nan"),
        ("heartbeat_s", 'heartbeat_s = "often"'),
        ("heart_beat_timeout_s", "heart_beat_timeout_s = -1"),
        ("heart_beat_timeout_s", "heart_beat_timeout_s = inf"),
        ("heart_beat_timeout_s", "heart_beat_timeout_s = 1e10"),
        ("shutdown_period_s", "shutdown_period_s = 0"),
        ("token_lifetime_s", "token_lifetime_s = 0"),
        ("token_lifetime_s", "token_lifetime_s = inf"),
        ("lost_after_s", "lost_after_s = -1"),
        ("lost_after_s", "lost_after_s = inf"),
        ("lease_s", "lease_s = 0"),
        ("lease_s", "lease_s = nan"),
        ("store", 'store = "store.db"'),
        ("store", 'store = "sqlite:///store.db"'),
        ("store", 'store = "mysql://db/hanse"'),
        ("address", 'address = "fl.example.org"'),
        ("address", 'address = "0.0.0.0:6007"'),
        ("address", 'address = "fl.example.org:0"'),
        ("tls", 'tls = "no"'),
    ],
)
def test_a_servers_field_that_does_not_hold_is_named(file: Path, field: str, line: str) -> None:
    file.write_text(f'project = "demo"\n{line}\n')

    with pytest.raises(ConfigError, match=f"^{field}") as wrong:
        read(file, ServerSettings)
    assert wrong.value.field == field


@pytest.mark.parametrize("kind", [ServerSettings, ClientSettings, AdminSettings])
@pytest.mark.parametrize("text", ["", 'project = "demo"\nname = "x"\nservers = ["h:1"]\nprojekt = "demo"\n'])
def test_a_missing_or_unknown_field_is_named_with_the_file(file: Path, kind: type[msgspec.Struct], text: str) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError, match=r"^(project|projekt|servers|name) in .*no (such field|default)") as wrong:
        read(file, kind)
    assert str(file) in str(wrong.value)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("name", CLIENT.replace("site-1", "site.1")),
        ("project", CLIENT.replace("demo", "")),
        ("servers", CLIENT.replace('"localhost:6007"', "")),
        ("servers[0]", CLIENT.replace('"localhost:6007"', "6007")),
        ("server_names", CLIENT + "server_names = []\n"),
        ("server_names[1]", CLIENT + 'server_names = ["server", "a.b"]\n'),
        ("policy.job_code", CLIENT + '[policy]\njob_code = "maybe"\n'),
        ("policy.max_update_norm", CLIENT + "[policy]\nmax_update_norm = -1\n"),
        ("policy.submitters[0]", CLIENT + "[policy]\nsubmitters = [1]\n"),
        ("resources.cpus", CLIENT + '[resources]\ncpus = "all"\n'),
    ],
)
def test_a_clients_field_that_does_not_hold_is_named(file: Path, field: str, text: str) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError) as wrong:
        read(file, ClientSettings)
    assert wrong.value.field == field


def test_an_unknown_word_of_the_policy_is_refused(file: Path) -> None:
    file.write_text(CLIENT + "[policy]\nallow_everything = true\n")

    with pytest.raises(ConfigError, match=r"^policy\.allow_everything in .* is True; expected no such field"):
        read(file, ClientSettings)


@pytest.mark.parametrize(
    ("text", "meant"),
    [(CLIENT + 'servers_name = ["hub"]\n', "server_names"), (CLIENT + "[policy]\njobcode = 'deny'\n", "job_code")],
)
def test_a_field_that_is_nearly_one_is_refused_with_the_one_that_is(file: Path, text: str, meant: str) -> None:
    file.write_text(text)

    with pytest.raises(ConfigError, match=f"expected no such field; perhaps '{meant}' is meant$"):
        read(file, ClientSettings)


@pytest.mark.parametrize("kind", [ClientSettings, AdminSettings])
def test_a_kit_of_release_0_1_0_is_read(file: Path, kind: type[ClientSettings | AdminSettings]) -> None:
    file.write_text(CLIENT + 'server_name = "hub"\n')

    assert read(file, kind).server_names == ("hub",)


def test_a_name_of_then_beside_todays_is_refused(file: Path) -> None:
    file.write_text(CLIENT + 'server_name = "hub"\nserver_names = ["hub"]\n')

    with pytest.raises(ConfigError, match=r"server_name in .* is 'hub'; expected no such field"):
        read(file, ClientSettings)


@pytest.mark.parametrize("content", [b"project =", b"\xff\xfe", b"a = 1\na = 2\n"])
def test_what_is_not_toml_is_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)

    with pytest.raises(ConfigError, match="expected TOML"):
        read(file, ServerSettings)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml.*No such file"):
        read(tmp_path / "nothing.toml", ServerSettings)
    with pytest.raises(ConfigError, match="expected a readable file"):
        read(tmp_path, ServerSettings)


@pytest.mark.parametrize("kind", [ServerSettings, ClientSettings, AdminSettings, SitePolicy])
def test_every_field_has_a_docstring_under_it(kind: type[msgspec.Struct]) -> None:
    tree = ast.parse(inspect.getsource(settings))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__).body
    documented = {
        field.target.id
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }

    assert documented == set(kind.__struct_fields__)
