"""The documentation says what there is: every setting, error, event and command has its entry, and examples run."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from benchmarks.__main__ import ALONE, DEPLOYED, LONG

import hanse.identity.project
import hanse.settings
from hanse.cli.failures import INTERRUPTED
from hanse.cli.job_text import JOB_ABORTED, JOB_FAILED
from hanse.cli.new import new
from hanse.doctor.findings import Check
from hanse.events import GATES, EventType
from hanse.job import JobSpec, WorkflowSpec, parse
from hanse.learning.workflow import WORKFLOWS, load_workflow
from hanse.messages import CATALOGUE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in (*DOCS.rglob("*.md"), *ROOT.glob("*.md")) if "_build" not in page.parts)
RUN = re.compile(r"^<!-- run -->\n+```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOML = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)")
VOCABULARY = re.compile(r"^```\{vocabulary\} (\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def vocabulary() -> ModuleType:
    """Load the extension that makes parts of the reference from the code; without Sphinx there is nothing to test."""
    pytest.importorskip("sphinx", reason="the documentation's tools are not installed")
    spec = importlib.util.spec_from_file_location("vocabulary", DOCS / "_ext" / "vocabulary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def defined_terms(text: str) -> set[str]:
    return set(re.findall(r"^`([^`\n]+)`\n: ", text, re.MULTILINE))


def settings_types(module: ModuleType) -> Iterator[type[msgspec.Struct]]:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__:
            yield value


@pytest.mark.parametrize("module", [hanse.settings, hanse.identity.project], ids=lambda module: module.__name__)
def test_every_field_that_an_operator_sets_has_an_entry(vocabulary: ModuleType, module: ModuleType) -> None:
    part = {"hanse.settings": "settings", "hanse.identity.project": "project-file"}[module.__name__]
    shown = defined_terms(vocabulary.PARTS[part]())
    types = list(settings_types(module))
    assert types
    assert {field for kind in types for field in kind.__struct_fields__} == shown


def test_every_error_code_has_an_entry(vocabulary: ModuleType) -> None:
    shown = vocabulary.errors()
    classes = vocabulary.error_classes()
    assert len(classes) > 20
    for cls in classes:
        assert f"| [`{cls.code}`](codes/{cls.code}.md) | `{cls.__name__}` |" in shown


def test_no_two_errors_share_a_code(vocabulary: ModuleType) -> None:
    codes = [cls.code for cls in vocabulary.error_classes()]
    assert sorted(codes) == sorted(set(codes))


def test_every_exit_status_is_listed_with_what_it_means(vocabulary: ModuleType) -> None:
    shown = vocabulary.exit_statuses()
    for status in {cls.exit_status for cls in vocabulary.error_classes()} | {0, JOB_FAILED, JOB_ABORTED, INTERRUPTED}:
        assert f"\n| {status} | " in shown


def test_every_event_has_an_entry_among_gates_or_notices() -> None:
    gates, notices = page("reference/events.md").split("\n## Gates\n")[1].split("\n## Notices\n")
    entry = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
    assert set(entry.findall(gates)) == {event.value for event in GATES}
    assert set(entry.findall(notices)) == {event.value for event in EventType} - {event.value for event in GATES}


def test_every_topic_has_an_entry(vocabulary: ModuleType) -> None:
    shown = vocabulary.topics()
    for channel, topic in CATALOGUE:
        assert f"| `{channel}` / `{topic}` |" in shown


def test_every_field_of_a_job_has_an_entry() -> None:
    assert defined_terms(page("reference/job.md")) == set(JobSpec.__struct_fields__)


def test_every_check_of_the_doctors_has_an_entry() -> None:
    assert defined_terms(page("how-to/doctor.md")) == {check.value for check in Check}


def test_every_workflow_has_an_entry(vocabulary: ModuleType) -> None:
    shown = vocabulary.workflows()
    for name in WORKFLOWS:
        assert f"## `{name}`\n" in shown


def test_every_benchmark_has_an_entry() -> None:
    shown = page("explanation/measured.md")
    names = [*ALONE, *DEPLOYED, *LONG]
    assert names
    for name in names:
        assert re.search(rf"\| `{name}` \||`python -m benchmarks [a-z_ ]*\b{name}\b", shown), name


def test_every_table_that_a_page_asks_for_can_be_made(vocabulary: ModuleType) -> None:
    asked = [part for text in (file.read_text(encoding="utf-8") for file in PAGES) for part in VOCABULARY.findall(text)]
    assert sorted(asked) == sorted(vocabulary.PARTS)
    for part in asked:
        assert vocabulary.PARTS[part]()


def test_a_field_without_a_description_fails_the_build(vocabulary: ModuleType) -> None:
    tree = vocabulary.ast.parse("class Settings:\n    port: int = 1\n    host: str\n    '''Where.'''\n")
    with pytest.raises(vocabulary.Undocumented, match=r"Settings\.port has no docstring"):
        list(vocabulary.settings_fields(tree.body[0]))


def test_every_command_has_an_entry() -> None:
    cli = pytest.importorskip("hanse.cli", reason="there is no command line yet", exc_type=ImportError)
    shown = page("reference/commands.md")
    commands = list(command_names(cli.app))
    assert commands
    for command in commands:
        assert f"| `hanse {command}" in shown, f"docs/reference/commands.md has no entry for {command!r}"


def command_names(app: object, prefix: str = "") -> Iterator[str]:
    """Yield the full names of all commands below *app*, a cyclopts app, without those that only group others."""
    for name in app:  # type: ignore[attr-defined]  # an App iterates over the names of its commands
        if name.startswith("-"):
            continue
        command = app[name]  # type: ignore[index]  # and gives each by its name
        below = list(command_names(command, f"{prefix}{name} "))
        yield from below or [f"{prefix}{name}"]


def toml_examples(table: str) -> list[object]:
    """Return the TOML examples of all pages that have *table*, each with its page's name and first line as its id."""
    return [
        pytest.param(found.group(1), id=f"{file.relative_to(ROOT)}:{text.count(chr(10), 0, found.start(1)) + 1}")
        for file in PAGES
        for text in [file.read_text(encoding="utf-8")]
        for found in TOML.finditer(text)
        if f"\n{table}\n" in f"\n{found.group(1)}"
    ]


@pytest.mark.parametrize("example", toml_examples("[server]"))
def test_example_of_a_projects_file_is_one(example: str, tmp_path: Path) -> None:
    file = tmp_path / "project.toml"
    file.write_text(example, encoding="utf-8")
    hanse.settings.read(file, hanse.identity.project.Project)


@pytest.mark.parametrize("example", toml_examples("[tool.hanse]"))
def test_example_of_a_job_is_one(example: str) -> None:
    parse(tomllib.loads(example)["tool"]["hanse"] | {"workflow": "fedavg"}, default_name="example")


def test_the_tutorial_shows_the_files_that_hanse_new_makes() -> None:
    tutorial = page("tutorial.md")
    template = ROOT / "src/hanse/cli/templates/numpy"
    made = " ".join(sorted(path.name.removesuffix(".txt") for path in template.iterdir())).replace(" ", "  ")
    assert f"$ ls my-job\n{made}\n" in tutorial
    definition = (template / "pyproject.toml.txt").read_text(encoding="utf-8")
    assert "[tool.hanse]" + definition.split("[tool.hanse]", 1)[1] in tutorial


@pytest.mark.parametrize("example", toml_examples("[tool.hanse.workflow]"))
def test_example_of_a_workflows_settings_is_accepted(example: str) -> None:
    table = tomllib.loads(example)["tool"]["hanse"]["workflow"]
    name = table.pop("name")
    if name in WORKFLOWS:
        load_workflow(WorkflowSpec(name, table), importlib.import_module)


@pytest.mark.parametrize("example", toml_examples("[policy]"))
def test_example_of_a_policy_is_one(example: str) -> None:
    msgspec.convert(tomllib.loads(example)["policy"], hanse.settings.SitePolicy)


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(file: Path) -> None:
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}, which there is not"


def test_the_page_on_what_survives_names_tests_that_there_are_and_every_file_of_faults() -> None:
    named = set(re.findall(r"`(tests/[\w/.]+)`", page("explanation/what-survives.md")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    # The proxy's own tests say of no run what it survives.
    faults = {f"tests/faults/{path.name}" for path in (ROOT / "tests/faults").glob("test_*.py")} - {
        "tests/faults/test_proxy.py"
    }
    assert faults - named == set(), "the page does not say what these hold"


@pytest.mark.parametrize(
    "file",
    [file for file in PAGES if RUN.search(file.read_text(encoding="utf-8"))],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_examples_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the marked examples of one page in their order, as one program."""
    text = file.read_text(encoding="utf-8")
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look up the module in which they are defined
    for found in RUN.finditer(text):
        line = text.count("\n", 0, found.start(1))
        code = compile("\n" * line + found.group(1), str(file), "exec")  # so that a traceback names the page's line
        exec(code, vars(module))


def test_the_readmes_program_runs_in_the_folder_that_hanse_new_makes(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (program,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "hanse.simulate(" in code)
    new(tmp_path / "my-job")
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "my-job",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("[")


def test_the_example_of_the_contributing_page_passes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(def test_.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec("from hanse.coordination.registry import Registry\n" + example, names)
    (test,) = (value for name, value in names.items() if name.startswith("test_"))
    test()  # type: ignore[operator]  # a function, as the pattern above has found
