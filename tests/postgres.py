"""A PostgreSQL of the tests' own, made in a temporary folder by the programs that are installed, and thrown away.

Tests ask for ``postgres``, the server, or for ``postgres_url``, an empty database in it (``tests/conftest.py``).
Where there is no PostgreSQL they are skipped, unless the environment's ``HANSE_TEST_REQUIRE`` names ``postgres``.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

NEEDED_BYTES = 2**30
CONNECT_TIMEOUT_S = 60
"""However busy the machine is, a server that is up takes a connection within this."""
ENDED_WITHIN_S = 30
PASSWORD = "s3cret/of@the tests"
DROP_SCHEMAS = """
DO $$DECLARE name text; BEGIN
    FOR name IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', name);
    END LOOP;
    CREATE SCHEMA public;
END$$
"""


class Postgres:
    """A server at *port* of 127.0.0.1, its data in *folder*: durable as PostgreSQL is by default, and never tuned.

    Its user ``hanse`` proves itself with ``PASSWORD``, which libpq finds in ``passfile``, as the URLs say.
    """

    def __init__(self, programs: Path, folder: Path, *, port: int) -> None:
        self._programs, self._folder, self.port = programs, folder, port
        # The server refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        # By a program: Python would have to fork for it, which a process that uses gRPC does not survive.
        self._as_user = (
            [] if self._user is None else ["setpriv", f"--reuid={self._user}", f"--regid={self._user}", "--init-groups"]
        )
        self._databases = 0
        self.passfile = folder / "passfile"
        self.passfile.touch(0o600)
        self.passfile.write_text(f"*:*:*:*:{PASSWORD}\n")

    def create(self) -> None:
        """Make the server's files."""
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        given = self._folder / "password"
        given.write_text(PASSWORD)
        self._run(
            "initdb", "--username=hanse", f"--pwfile={given}", "--auth=scram-sha-256", "--encoding=UTF8",
            "--no-locale", "--no-sync",
        )  # fmt: skip
        with (self._folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n")

    def start(self) -> None:
        """Return when the server takes connections."""
        self._run("pg_ctl", "start", "--wait", "--timeout=60", f"--log={self._folder / 'log'}")

    def stop(self, *, immediate: bool = False) -> None:
        """Return when the server has ended; *immediate* is as a crash: it must recover when it starts."""
        self._run("pg_ctl", "stop", "--wait", "--timeout=60", f"--mode={'immediate' if immediate else 'fast'}")

    def url(self, database: str) -> str:
        """Return how a store finds *database*; the password is not in it."""
        query = f"passfile={self.passfile}&connect_timeout={CONNECT_TIMEOUT_S}"
        return f"postgresql://hanse@127.0.0.1:{self.port}/{database}?{query}"

    def new_database(self, *, encoding: str = "UTF8") -> str:
        """Make a database and return its name."""
        self._databases += 1
        name = f"test_{self._databases}"
        self._create_database(name, encoding)
        return name

    def empty_database(self) -> str:
        """Return the name of a database as if new, the same each time: to make one anew takes seconds."""
        name = "emptied"
        if not self.execute(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
            self._create_database(name, "UTF8")
        of_clients = f"FROM pg_stat_activity WHERE datname = '{name}' AND backend_type = 'client backend'"
        # Who is told to end may still be ending, with its locks.
        self.execute(f"SELECT pg_terminate_backend(pid, {ENDED_WITHIN_S * 1000}) {of_clients}")
        left = self.execute(f"SELECT pid, state, query {of_clients}")
        assert not left, f"a test has left connections to the database that do not end or are made anew: {left}"
        self.execute(f"ALTER DATABASE {name} RESET ALL")
        self.execute(DROP_SCHEMAS, database=name)
        return name

    def _create_database(self, name: str, encoding: str) -> None:
        # From the template that nobody can be connected to: of another, none can be made meanwhile.
        self.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0")

    def execute(self, statement: str, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run *statement* by itself, and return its rows."""
        options: dict[str, Any] = {"user": "hanse", "password": PASSWORD, "dbname": database}
        with psycopg.connect(host="127.0.0.1", port=self.port, autocommit=True, **options) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _run(self, program: str, *arguments: str) -> None:
        outcome = subprocess.run(
            [*self._as_user, str(self._programs / program), f"--pgdata={self._folder / 'data'}", *arguments],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        log = self._folder / "log"
        said = log.read_text()[-2000:] if log.exists() else ""
        assert outcome.returncode == 0, f"{program}: {outcome.stderr}{said}"


@contextmanager
def throw_away_server() -> Iterator[Postgres]:
    """Run a server while the block lasts; skip the test, or fail it, where none is installed."""
    programs = _programs()
    if programs is None:
        reason = "no PostgreSQL server is installed: /usr/lib/postgresql/*/bin/initdb, or initdb on the PATH"
        if "postgres" in os.environ.get("HANSE_TEST_REQUIRE", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="hanse-postgres-", dir=_in_memory()))
    try:
        with _reserved_port() as port:
            server = Postgres(programs, folder, port=port)
            server.create()
            try:
                server.start()
                yield server
            finally:
                if (folder / "data" / "postmaster.pid").exists():
                    server.stop(immediate=True)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """Keep a port of 127.0.0.1 for one server while the block lasts: also until it has started, and while it is away.

    On Linux, who sets ``SO_REUSEADDR``, as PostgreSQL does, may listen at a port that is bound like this; to nobody
    else is it given, neither to listen nor to connect from. Other systems do not share a port: there it is let go.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        if sys.platform != "linux":
            held.close()
        yield port


def _in_memory() -> Path | None:
    """Return where files cost no disk, if there is room: the tests end processes, and do not pull plugs."""
    folder = Path("/dev/shm")
    servers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # one a worker, and none has taken its room yet
    return folder if folder.is_dir() and shutil.disk_usage(folder).free > NEEDED_BYTES * servers else None


def _programs() -> Path | None:
    def version(folder: Path) -> int:
        return int(folder.parent.name) if folder.parent.name.isdigit() else 0

    found = sorted((each.parent for each in Path("/usr/lib/postgresql").glob("*/bin/initdb")), key=version)
    if found:
        return found[-1]
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None
