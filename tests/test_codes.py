"""The table of codes has every code that the product records or prints, and each has advice and a page."""

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

import hanse
from hanse.codes import CODES, advice
from hanse.errors import HanseError

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "hanse"
PAGES = ROOT / "docs" / "reference" / "codes"
NOT_IMPORTED = re.compile(r"_pb2(_grpc)?$|__main__$|\.migrations(\.|$)")
CODE = re.compile(r"[a-z]+(-[a-z]+)*")
FAILURE_KINDS = ("config", "exception", "unsafe")
"""What a ``JobFailure`` may be, which makes a code where it has none of its own."""


def error_classes(kind: type[HanseError] = HanseError) -> Iterator[type[HanseError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from error_classes(below)


def raised_codes() -> set[str]:
    for module in pkgutil.walk_packages(hanse.__path__, "hanse."):
        if not NOT_IMPORTED.search(module.name):
            importlib.import_module(module.name)
    return {kind.code for kind in error_classes() if kind.__module__.startswith("hanse.")}


def constants(trees: Iterable[ast.Module]) -> dict[str, str]:
    """Return what the constants of modules stand for that are text."""
    return {
        node.target.id: node.value.value
        for tree in trees
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def said_in(node: ast.expr, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the texts that *node* may be, as far as it says them itself or by constants."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.Name(id=name) if name in known:
            yield known[name]
        case ast.IfExp(body=body, orelse=otherwise):
            yield from said_in(body, known)
            yield from said_in(otherwise, known)


def codes_in(tree: ast.Module, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the codes that a module gives to faults and ends without raising anything."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="TaskFault" | "Trouble"), args=[code, *_]):
                yield from said_in(code, known)
            case ast.Call(func=ast.Attribute(attr="_fail"), args=[_, code, *_]):
                yield from said_in(code, known)
            case ast.Assign(targets=[ast.Name(id="code")], value=code):
                yield from said_in(code, known)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in ("code", "cause"):
                    yield from said_in(keyword.value, known)


def written_codes() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py") if path.name != "codes.py"]
    known = constants(trees)
    return {code for tree in trees for code in codes_in(tree, known) if code}


def test_every_code_that_is_raised_recorded_or_printed_is_in_the_table_and_no_other() -> None:
    raised, written = raised_codes(), written_codes()
    assert len(raised) > 30
    made_by_runs = {"no-clients", "launch-refused", "aborted", "stopped"}
    faults = {"task-refused", "client-lost", "client-failed", "deadline", "no-answer"}
    assert made_by_runs | faults <= written

    assert set(CODES) == raised | written | {f"client-{kind}" for kind in FAILURE_KINDS}


@pytest.mark.parametrize("name", CODES)
def test_every_code_says_in_sentences_what_it_means_and_what_to_do(name: str) -> None:
    code = CODES[name]
    assert CODE.fullmatch(name)
    assert code.name == name
    for text in (code.means, code.advice):
        assert text.endswith(".")
        assert text[0].isupper()
        assert len(text) < 300


def test_the_pages_are_those_of_the_codes() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(CODES) | {"index"}


@pytest.mark.parametrize("name", CODES)
def test_every_page_says_why_it_happens_and_how_to_find_out_more(name: str) -> None:
    title, shown, *sections = re.split(r"\n{2,}(?=```|## )", (PAGES / f"{name}.md").read_text(encoding="utf-8"))
    assert title == f"# `{name}`"
    assert shown == f"```{{stable-code}} {name}\n```"
    heads = [section.partition("\n\n") for section in sections]
    assert [head for head, _, _ in heads] == ["## Why it happens", "## How to find out more"]
    assert all(len(text.strip()) > 40 for _, _, text in heads)


def test_the_advice_is_that_of_the_first_code_that_is_known() -> None:
    assert advice("out-of-memory", "too-few-clients") == CODES["out-of-memory"].advice
    assert advice("", "too-few-clients") == CODES["too-few-clients"].advice
    assert advice("of-a-later-release") == ""
    assert advice() == ""
