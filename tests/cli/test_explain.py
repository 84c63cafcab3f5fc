"""``hanse explain``: what a code means, offline."""

import json

from hanse.codes import CODES

from .conftest import Hanse


def test_a_code_is_explained_with_what_to_do(hanse: Hanse) -> None:
    code = CODES["no-space"]
    assert hanse("explain", "no-space").out == f"no-space: {code.means}\n{code.advice}\n"
    document = json.loads(hanse("explain", "no-space", "--format", "json").out)
    assert document == {"code": "no-space", "means": code.means, "advice": code.advice}


def test_without_a_code_all_are_listed(hanse: Hanse) -> None:
    assert {line.split()[0] for line in hanse("explain").out.splitlines()} >= set(CODES)
    assert json.loads(hanse("explain", "--format", "json").out)["codes"].keys() == CODES.keys()


def test_a_code_that_there_is_not_is_not_found(hanse: Hanse) -> None:
    ended = hanse("explain", "no-such-code")
    assert (ended.status, ended.err) == (3, "hanse: there is no code 'no-such-code' [not-found]\n")
