"""Names of things: what may be one, and how a cell's address is put together and taken apart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.ids import (
    SERVER,
    Fqcn,
    JobId,
    is_dialable,
    is_digest,
    is_job_id,
    is_name,
    is_target,
    job_cell,
    split_cell,
)

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_@-]{0,62}", fullmatch=True)
JOB_IDS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True)


@pytest.mark.parametrize("text", ["server", "site-1", "A", "9", "ada@demo", "a_b", "a" * 63])
def test_a_name_is_letters_digits_dashes_underscores_and_at_signs(text: str) -> None:
    assert is_name(text)


@pytest.mark.parametrize(
    "text", ["", "a" * 64, "-a", "_a", "@a", "a.b", "a/b", "..", "a b", "a\n", "\na", "ä", "a\x00", "٣"]
)
def test_what_could_mislead_a_path_or_an_address_is_no_name(text: str) -> None:
    assert not is_name(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", True), ("2024-x", True), ("a" * 63, True), ("a" * 64, False), ("", False), ("A", False), ("-a", False),
     ("a.b", False), ("a_b", False), ("a\n", False)],
)  # fmt: skip
def test_a_jobs_id_is_lower_case(text: str, expected: bool) -> None:
    assert is_job_id(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0" * 64, True), ("f" * 64, True), ("F" * 64, False), ("0" * 63, False), ("0" * 65, False), ("g" * 64, False),
     ("0" * 64 + "\n", False), ("../" + "0" * 61, False)],
)  # fmt: skip
def test_a_digest_is_64_lower_case_hexadecimal_digits(text: str, expected: bool) -> None:
    assert is_digest(text) == expected


@given(NAMES, JOB_IDS)
def test_an_address_is_taken_apart_as_it_was_put_together(name: str, job_id: str) -> None:
    assert is_name(name)
    assert is_job_id(job_id)
    assert split_cell(job_cell(name, JobId(job_id))) == (name, job_id)


@given(NAMES)
def test_a_participants_own_cell_has_no_job(name: str) -> None:
    assert split_cell(Fqcn(name)) == (name, None)


def test_the_servers_cell_has_its_name() -> None:
    assert SERVER == "server"
    assert job_cell(SERVER, JobId("j1")) == "server.j1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("localhost:6007", True), ("10.0.0.7:0", True), ("[::1]:65535", True), ("[fe80::1%eth0]:1", True),
     ("localhost", False), ("localhost:65536", False), (":6007", False), ("::1:6007", False), ("a b:1", False),
     ("h:-1", False), ("h:1\n", False), ("", False)],
)  # fmt: skip
def test_a_target_is_host_and_port(text: str, expected: bool) -> None:
    assert is_target(text) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [("fl.example.org:443", True), ("127.0.0.1:6007", True), ("[::1]:6007", True),
     ("0.0.0.0:6007", False), ("[::]:6007", False), ("[0:0::0]:6007", False), ("localhost:0", False),
     ("localhost", False), ("", False)],
)  # fmt: skip
def test_a_wildcard_or_a_free_port_cannot_be_dialled(target: str, expected: bool) -> None:
    assert is_dialable(target) == expected
