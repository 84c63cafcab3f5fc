"""A PostgreSQL of the tests' own, made in a temporary folder by the programs that are installed, and thrown away.

Tests ask for ``postgres``, the server, or for ``postgres_url``, an empty database in it (``tests/conftest.py``).
Where there is no PostgreSQL they are skipped, unless the environment's ``HANSE_TEST_REQUIRE`` names ``postgres``.
"""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

NEEDED_BYTES = 2**30
PASSWORD = "s3cret/of@the tests"


class Postgres:
    """A server on 127.0.0.1 with its data in *folder*: durable as PostgreSQL is by default, and never tuned.

    Its user ``hanse`` proves itself with ``PASSWORD``, which libpq finds in ``passfile``, as the URLs say.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._folder = programs, folder
        # The server refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        # By a program: Python would have to fork for it, which a process that uses gRPC does not survive.
        self._as_user = (
            [] if self._user is None else ["setpriv", f"--reuid={self._user}", f"--regid={self._user}", "--init-groups"]
        )
        self._databases = 0
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port: int = listener.getsockname()[1]
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

    @property
    def pid(self) -> int:
        """The number of the server's first process."""
        return int((self._folder / "data" / "postmaster.pid").read_text().split()[0])

    def url(self, database: str) -> str:
        """Return how a store finds *database*; the password is not in it."""
        return f"postgresql://hanse@127.0.0.1:{self.port}/{database}?passfile={self.passfile}"

    def new_database(self) -> str:
        """Make a database and return its name."""
        self._databases += 1
        name = f"test_{self._databases}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def empty_database(self) -> str:
        """Return the name of a database with nothing in it, the same each time: to make one anew takes seconds."""
        name = "emptied"
        if not self.execute(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
            self.execute(f"CREATE DATABASE {name}")
        within_ms = 30_000  # who is told to end may still be ending, with its locks
        self.execute(f"SELECT pg_terminate_backend(pid, {within_ms}) FROM pg_stat_activity WHERE datname = '{name}'")
        self.execute("DROP SCHEMA public CASCADE", database=name)
        self.execute("CREATE SCHEMA public", database=name)
        return name

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
        assert outcome.returncode == 0, f"{program}: {outcome.stderr}"


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
        server = Postgres(programs, folder)
        server.create()
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop(immediate=True)
    finally:
        shutil.rmtree(folder)


def _in_memory() -> Path | None:
    """Return where files cost no disk, if there is room: the tests end processes, and do not pull plugs."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free > NEEDED_BYTES else None


def _programs() -> Path | None:
    def version(folder: Path) -> int:
        return int(folder.parent.name) if folder.parent.name.isdigit() else 0

    found = sorted((each.parent for each in Path("/usr/lib/postgresql").glob("*/bin/initdb")), key=version)
    if found:
        return found[-1]
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None
