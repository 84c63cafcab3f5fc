import json
import logging
import sys

import pytest

from hanse.cli.logs import JsonFormatter, TextFormatter, show_logs

from .conftest import Hanse


def record(message: str = "client registered", level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    return logging.getLogger("hanse.x").makeRecord("hanse.x", level, "f", 1, message, (), None, extra=fields)


def test_fields_follow_the_sentence() -> None:
    line = TextFormatter().format(record(client="site-1", took_s=0.5, reason='it said "no" twice', empty=""))
    assert line.endswith(
        'INFO hanse.x client registered client=site-1 took_s=0.5 reason="it said \\"no\\" twice" empty=""'
    )


def test_a_field_cannot_forge_a_line() -> None:
    assert "\n" not in TextFormatter().format(record(reason="one\ntwo"))
    assert "\n" not in JsonFormatter().format(record(reason="one\ntwo"))


def test_a_field_cannot_command_a_terminal() -> None:
    line = TextFormatter().format(record(reason="\x1b[2J\x07\x9b\u202e"))
    assert line.isprintable()


def test_json_has_the_fields_beside_what_every_line_has() -> None:
    entry = json.loads(JsonFormatter().format(record(client="site-1", path=object)))
    assert entry["message"] == "client registered"
    assert entry["level"] == "info"
    assert entry["logger"] == "hanse.x"
    assert entry["client"] == "site-1"
    assert entry["path"] == str(object)


def test_a_field_does_not_stand_in_for_the_sentence() -> None:
    forged = record()
    forged.level = "x"
    assert json.loads(JsonFormatter().format(forged))["level"] == "info"


def test_a_traceback_is_shown() -> None:
    try:
        raise ValueError("what")
    except ValueError:
        failed = record()
        failed.exc_info = sys.exc_info()
    assert TextFormatter().format(failed).endswith("ValueError: what")
    assert "ValueError: what" in json.loads(JsonFormatter().format(failed))["traceback"]


@pytest.mark.parametrize(("verbose", "seen"), [(False, ["info"]), (True, ["debug", "info"])])
def test_verbose_shows_all_of_ours_and_no_more_of_others(
    verbose: bool, seen: list[str], hanse: Hanse, capsys: pytest.CaptureFixture[str]
) -> None:
    show_logs(logging.INFO, as_json=True, verbose=verbose)
    logging.getLogger("hanse.x").debug("ours")
    logging.getLogger("hanse.x").info("ours")
    logging.getLogger("other").info("not ours")
    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()] == seen
