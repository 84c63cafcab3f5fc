import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hanse.cli
from hanse.cell.refusals import RemoteError, error_from, refuse
from hanse.cli.failures import failure_of
from hanse.codes import CODES
from hanse.errors import Conflict, HanseError, StoreFailed, Unauthorized

from .conftest import Hanse

RELEASE = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
HEAVY = {"numpy", "grpc", "sqlalchemy", "cryptography", "msgspec", "asyncio"}


def python(code: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, **more)  # type: ignore[call-overload,no-any-return]


def test_help_loads_nothing_that_help_does_not_need() -> None:
    ended = python(
        "import sys; import hanse.cli; hanse.cli.main(['--help']);"
        f"loaded = {{name.split('.')[0] for name in sys.modules}}; print(sorted(loaded & {HEAVY!r}), file=sys.stderr);"
        "print([name for name in sys.modules if name.startswith('hanse.') and name not in"
        " ('hanse.cli', 'hanse.cli.failures', 'hanse.cli.terminal', 'hanse.codes', 'hanse.errors')], file=sys.stderr)"
    )
    assert ended.stderr.splitlines() == ["[]", "[]"]
    assert "provision" in ended.stdout


def test_the_installed_command_runs() -> None:
    command = [os.path.join(os.path.dirname(sys.executable), "hanse"), "version"]  # noqa: PTH118, PTH120 - the link itself
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"{RELEASE}\n")


@pytest.mark.parametrize("command", hanse.cli.COMMANDS)
def test_every_command_has_help_and_prints_json(command: str, hanse: Hanse) -> None:
    ended = hanse(*command.split(), "--help")
    assert ended.status == 0
    assert "--format" in ended.out
    assert "--verbose" in ended.out


def test_version_as_json_is_one_document(hanse: Hanse) -> None:
    ended = hanse("version", "--format", "json")
    assert json.loads(ended.out)["release"] == RELEASE
    assert ended.err == ""


@pytest.mark.parametrize(
    "arguments", ["jub", "job lst", "new", "new x --colour", "job list --limit many", "job list x"]
)
def test_arguments_that_cannot_be_are_one_sentence(arguments: str, hanse: Hanse) -> None:
    ended = hanse(*arguments.split())
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith("hanse: ")
    assert ended.err.count("\n") == 1


def test_arguments_that_cannot_be_are_a_document_where_json_is_asked_for(hanse: Hanse) -> None:
    for asked in (("--format", "json"), ("--format=json",)):
        ended = hanse("job", "lst", *asked)
        assert ended.status == 2
        assert json.loads(ended.err)["error"]["code"] == "usage"


def test_an_error_ends_the_command_with_its_sentence_and_status(hanse: Hanse) -> None:
    ended = hanse("job", "list")
    assert ended.status == 2
    assert (
        ended.err == "hanse: --kit is None; expected the folder of an administrator's kit (or set HANSE_KIT) [config]\n"
    )
    document = json.loads(hanse("job", "list", "--format", "json").err)
    reason = ended.err.removeprefix("hanse: ").removesuffix(" [config]\n")
    assert document == {"error": {"code": "config", "reason": reason, "advice": CODES["config"].advice}}


def _errors() -> list[type[HanseError]]:
    def tree(kind: type[HanseError]) -> list[type[HanseError]]:
        return [kind, *(each for below in kind.__subclasses__() for each in tree(below))]

    return [kind for kind in tree(HanseError) if kind.__module__ == "hanse.errors"]


@pytest.mark.parametrize("kind", _errors(), ids=lambda kind: kind.__name__)
def test_what_a_server_answers_ends_a_command_as_the_same_error_would_here(kind: type[HanseError]) -> None:
    error = kind.__new__(kind)
    Exception.__init__(error, "the sentence")
    told = error_from(refuse(error).headers)
    failure = failure_of(told)
    assert (failure.code, failure.status) == (kind.code, kind.exit_status)
    assert failure.reason == "the sentence"


def test_an_error_of_the_system_is_told_without_a_traceback() -> None:
    failure = failure_of(PermissionError(13, "Permission denied", "/x"))
    assert (failure.reason, failure.status) == ("/x: Permission denied", 12)


def test_a_bug_says_that_it_is_one_and_shows_where_only_when_asked(
    hanse: Hanse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse.cli.version.version_of", lambda _: 1 / 0)
    ended = hanse("version")
    assert ended.status == 70
    assert ended.err.count("\n") == 1
    assert "ZeroDivisionError" in ended.err
    assert "Traceback" in hanse("version", "--verbose").err


def test_ctrl_c_ends_a_command_without_a_traceback(hanse: Hanse, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        return ""

    monkeypatch.setattr("hanse.cli.version.version_of", interrupted)
    assert hanse("version").status == 130


@pytest.mark.parametrize("arguments", [["version"], ["explain"], ["--help"]], ids=["lines", "a table", "help"])
def test_a_reader_that_has_enough_is_no_error(arguments: list[str]) -> None:
    ended = python(
        "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)\n"
        f"import hanse.cli; status = hanse.cli.main({arguments}); print(status, file=sys.stderr)"
    )
    assert ended.stderr == "0\n"


def test_a_command_whose_standard_files_are_closed_does_its_work_and_opens_nothing_in_their_place(
    tmp_path: Path,
) -> None:
    program = (
        "import os, sys, hanse.cli\n"
        "status = hanse.cli.main(['version'])\n"
        "are_null = [os.path.samestat(os.fstat(number), os.stat(os.devnull)) for number in range(3)]\n"
        "open(sys.argv[1], 'w').write(f'{status} {are_null}')\n"
    )
    said = tmp_path / "said"
    closing = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", closing, sys.executable, program, str(said)], check=True)
    assert said.read_text() == "0 [True, True, True]"


def test_errors_keep_their_codes_over_the_wire() -> None:
    for error in (Unauthorized("x", "y", needs="z"), Conflict("x", state="y", wanted="z"), StoreFailed("x", "y")):
        told = error_from(refuse(error).headers)
        assert isinstance(told, RemoteError)
        assert failure_of(told).status == error.exit_status
