"""The parts of the reference that are read from the code: each function returns Markdown, and a directive shows it.

A page says ``{vocabulary} settings`` and gets what ``PARTS["settings"]`` returns, so that no list of fields, errors or
topics is kept by hand beside the one that the code has. What lacks a description is an error here: the build fails.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from types import ModuleType
from typing import Any, Final, TypeVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import hanse
import hanse.identity.project
import hanse.settings
from hanse.cli.failures import INTERRUPTED
from hanse.cli.job_text import JOB_ABORTED, JOB_FAILED
from hanse.codes import CODES
from hanse.coordination.policy import PEER, ROLE_RIGHTS, Right
from hanse.coordination.runs import LEGAL as CLIENT_LEGAL
from hanse.coordination.service import TABLE as SERVICE_TABLE
from hanse.coordination.service import RequestKind, ServiceState, message
from hanse.errors import HanseError
from hanse.job import LEGAL
from hanse.learning.participation import Participation
from hanse.learning.training import TrainingSettings
from hanse.learning.workflow import WORKFLOWS
from hanse.messages import CATALOGUE

State = TypeVar("State", bound=StrEnum)

NO_ERRORS: Final = {
    0: "the command did what it was asked",
    JOB_FAILED: "the job that the command saw to its end failed (`hanse job wait`, `job submit --wait`, `simulate`)",
    JOB_ABORTED: "that job was aborted",
    INTERRUPTED: "Ctrl-C",
}
"""Exit statuses that stand for no error's class."""

NOT_IMPORTED: Final = re.compile(r"_pb2(_grpc)?$|__main__$|\.migrations(\.|$)")
"""Generated modules, programs, and the steps of migrations, which Alembic runs."""


class Undocumented(Exception):
    """Something that the reference must describe has no description in the code."""


def settings() -> str:
    """Return every settings type with its fields: type, default and the docstring under the field."""
    types = ("ServerSettings", "ClientSettings", "SitePolicy", "AdminSettings")
    classes = class_definitions(hanse.settings)
    return "\n\n".join(f"## {name}\n\n{_fields_of(classes[name])}" for name in types)


def project_file() -> str:
    """Return the fields of a project's file, table by table."""
    tables = {
        "At the top": "Project",
        "`[server]` and `[[standbys]]`": "ServerEntry",
        "`[[clients]]`": "ClientEntry",
        "`[[admins]]`": "AdminEntry",
    }
    classes = class_definitions(hanse.identity.project)
    return "\n\n".join(f"### {table}\n\n{_fields_of(classes[name])}" for table, name in tables.items())


def class_definitions(module: ModuleType) -> dict[str, ast.ClassDef]:
    """Return the classes that *module* defines, by name, as syntax: only there do docstrings under fields exist."""
    return {node.name: node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)}


def settings_fields(class_definition: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default (empty: there is none) and docstring of each field of *class_definition*."""
    body = class_definition.body
    for position, node in enumerate(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        after = body[position + 1] if position + 1 < len(body) else None
        if not (
            isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
        ):
            raise Undocumented(f"{class_definition.name}.{node.target.id} has no docstring under it")
        default = ast.unparse(node.value) if node.value else ""
        yield node.target.id, ast.unparse(node.annotation), default, inspect.cleandoc(after.value.value)


def errors() -> str:
    """Return the table of all errors: code, class, whose it is, exit status, whether to try again."""
    rows = [
        (
            f"[`{cls.code}`](codes/{cls.code}.md)",
            f"`{cls.__name__}`",
            _branch(cls),
            str(cls.exit_status),
            "yes" if cls.retryable else "no",
        )
        for cls in error_classes()
    ]
    return _table(("code", "class", "kind", "exit status", "may succeed later"), rows)


def ends_and_faults() -> str:
    """Return the table of the codes that no error has: ends of jobs and faults of tasks, and what they mean."""
    raised = {cls.code for cls in error_classes()}
    rows = [(f"[`{name}`](codes/{name}.md)", code.means) for name, code in CODES.items() if name not in raised]
    return _table(("code", "meaning"), rows)


def codes() -> str:
    """Return the table of all codes and what they mean."""
    return _table(("code", "meaning"), [(f"[`{name}`]({name}.md)", code.means) for name, code in CODES.items()])


def code(name: str) -> str:
    """Return what is known of one code: what happened, what to do, and of an error's how it is told."""
    known = CODES[name]
    parts = [f"{_markdown(known.means)}", f"**What to do.** {_markdown(known.advice)}"]
    for cls in error_classes():
        if cls.code == name:
            again = "The same call may succeed later." if cls.retryable else "The same call will fail again."
            parts.append(f"The class is `{cls.__name__}`; a command that meets it ends with {cls.exit_status}. {again}")
    return "\n\n".join(parts)


def error_classes() -> list[type[HanseError]]:
    """Return every error class of the package, each after the class that it derives from."""
    for module in pkgutil.walk_packages(hanse.__path__, "hanse."):
        if not NOT_IMPORTED.search(module.name):
            importlib.import_module(module.name)

    def derived(cls: type[HanseError]) -> Iterator[type[HanseError]]:
        yield cls
        for child in cls.__subclasses__():
            yield from derived(child)

    return [cls for cls in derived(HanseError) if cls.__module__.startswith("hanse.")]


def exit_statuses() -> str:
    """Return the table of what the command line ends with: for which errors, and for what else."""
    codes: dict[int, list[str]] = {}
    for cls in error_classes():
        codes.setdefault(cls.exit_status, []).append(f"`{cls.code}`")
    meanings = {status: ", ".join(codes[status]) for status in codes} | NO_ERRORS
    return _table(("status", "when"), [(str(status), meanings[status]) for status in sorted(meanings)])


def topics() -> str:
    """Return the table of all topics: who may send them, what they carry, what comes back."""
    rows = [
        (
            f"`{channel}` / `{topic}`",
            ", ".join(kind.value for kind, may_send in PEER.items() if (channel, topic) in may_send) or "nobody",
            _payload(request),
            _payload(reply),
            _summary(request) if request else "",
        )
        for (channel, topic), (request, reply) in CATALOGUE.items()
    ]
    return _table(("channel / topic", "sent by", "carries", "reply carries", "meaning"), rows)


def job_states() -> str:
    """Return the table of a job's states and what may follow each."""
    return _transitions(LEGAL, end="nothing: the job has ended")


def client_states() -> str:
    """Return the table of how a client may stand in a run, and what may follow each."""
    return _transitions(CLIENT_LEGAL, end="nothing: it is over")


def service_states() -> str:
    """Return the table of a server's states and how it answers each kind of request in them."""
    kinds = tuple(RequestKind)
    rows = [
        (f"`{state.value}`", *(message(SERVICE_TABLE[state, kind]) or "yes" for kind in kinds))
        for state in ServiceState
    ]
    return _table(("state", *(kind.value.replace("_", " ") for kind in kinds)), rows)


def roles() -> str:
    """Return the table of administrators' roles and what each may do."""
    rows = [
        (f"`{right.value}`", *("yes" if right in rights else "no" for rights in ROLE_RIGHTS.values()))
        for right in Right
    ]
    return _table(("right", *(f"`{role}`" for role in ROLE_RIGHTS)), rows)


def workflows() -> str:
    """Return every workflow by its short name, as autodoc entries of the classes: their settings, not their methods."""
    return "\n\n".join(
        f"## `{name}`\n\n{_autodoc('autoclass', reference.replace(':', '.'), members=_settings_of(reference))}"
        for name, reference in WORKFLOWS.items()
    )


def public_names() -> str:
    """Return every name that the top package exports, as autodoc entries."""
    return "\n\n".join(_autodoc_of(hanse, name) for name in _public(hanse))


def script_names() -> str:
    """Return the functions and types of ``hanse.client``, as autodoc entries."""
    module = importlib.import_module("hanse.client")
    elsewhere = set(_public(hanse))
    return "\n\n".join(_autodoc_of(module, name) for name in _public(module) if name not in elsewhere)


PARTS: Final[Mapping[str, Callable[[], str]]] = {
    "settings": settings,
    "project-file": project_file,
    "errors": errors,
    "ends-and-faults": ends_and_faults,
    "codes": codes,
    "exit-statuses": exit_statuses,
    "topics": topics,
    "job-states": job_states,
    "client-states": client_states,
    "service-states": service_states,
    "roles": roles,
    "workflows": workflows,
    "public-names": public_names,
    "script-names": script_names,
}


class Vocabulary(SphinxDirective):
    """``{vocabulary} PART``: show what the function in ``PARTS`` returns."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the part as nodes, parsed as the page around it."""
        text = PARTS[self.arguments[0]]()
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class CodePage(SphinxDirective):
    """``{stable-code} CODE``: show what ``hanse.codes`` says of it."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return it as nodes."""
        return self.parse_text_to_nodes(code(self.arguments[0]))


def setup(app: Sphinx) -> Mapping[str, Any]:
    """Register the directive; Sphinx calls this."""
    app.add_directive("vocabulary", Vocabulary)
    app.add_directive("stable-code", CodePage)
    app.connect("autodoc-process-docstring", _restore_colon, priority=600)  # after napoleon, which has 500
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


def _restore_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Undo what napoleon does to an attribute's sentence with a colon: it takes what stands before it for a type."""
    del app, name, obj, options
    if what in ("attribute", "property") and lines:
        for position, line in enumerate(lines):
            if line.startswith(":type: "):
                lines[0] = f"{line.removeprefix(':type: ')}: {lines[0]}"
                del lines[position]
                return


def _fields_of(class_definition: ast.ClassDef) -> str:
    entries = [_markdown(ast.get_docstring(class_definition) or "")]
    for name, kind, default, text in settings_fields(class_definition):
        shown = f"default `{default}`" if default else "required"
        body = _markdown(text).replace("\n", "\n  ")
        entries.append(f"`{name}`\n: `{kind}`, {shown}. {body}")
    return "\n\n".join(entries)


def _branch(cls: type[HanseError]) -> str:
    below_root = [base for base in cls.__mro__ if issubclass(base, HanseError) and base is not HanseError]
    return f"`{below_root[-1].__name__}`" if below_root else ""


def _summary(thing: object) -> str:
    doc = inspect.getdoc(thing) if "__doc__" in vars(thing) else None
    if not doc:
        raise Undocumented(f"{thing} has no docstring")
    return _markdown(" ".join(doc.split("\n\n")[0].split()))


def _payload(struct: type | None) -> str:
    return f"`{struct.__name__}`" if struct else "nothing"


def _transitions(legal: Mapping[State, Collection[State]], *, end: str) -> str:
    """Return a table of states with what may follow each, in the order in which their enum has them."""
    rows = [
        (f"`{state}`", ", ".join(f"`{other}`" for other in legal if other in following) or end)
        for state, following in legal.items()
    ]
    return _table(("state", "may become"), rows)


def _markdown(text: str) -> str:
    """Return a docstring's text, whose literals have double backticks, as Markdown that may stand in a table's cell."""
    return text.replace("``", "`").replace("|", "\\|")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _settings_of(reference: str) -> str:
    module, _, class_name = reference.partition(":")
    cls = getattr(importlib.import_module(module), class_name)
    elsewhere = next((base for base in (TrainingSettings, Participation) if issubclass(cls, base)), None)
    shared = {item.name for item in dataclasses.fields(elsewhere)} if elsewhere else set()
    return ", ".join(item.name for item in dataclasses.fields(cls) if item.name not in shared)


def _autodoc(directive: str, target: str, *, members: str = "") -> str:
    option = f"\n   :members: {members}" if members else ""
    return f"```{{eval-rst}}\n.. {directive}:: {target}{option}\n```"


def _public(module: ModuleType) -> tuple[str, ...]:
    return tuple(vars(module).get("__all__", ()))


def _autodoc_of(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if inspect.ismodule(value):
        return f"`{module.__name__}.{name}`\n: {_summary(value)}"
    if inspect.isclass(value):
        if f"{value.__module__}:{name}" in WORKFLOWS.values():
            return f"`{module.__name__}.{name}`\n: {_summary(value)} It is among the [workflows](workflows.md)."
        ours = [base for base in inspect.getmro(value) if base.__module__.startswith("hanse.")]
        members = {member: None for base in ours for member in vars(base) if not member.startswith("_")}
        return _autodoc("autoclass", f"{module.__name__}.{name}", members=", ".join(members))
    if inspect.isfunction(value):
        return _autodoc("autofunction", f"{module.__name__}.{name}")
    return _autodoc("autodata", f"{module.__name__}.{name}")
