import logging

import pytest

from hanse.launch.log_lines import FieldFormatter, FieldLogger, log_to_stderr


def line(message: str, level: int = logging.INFO, **fields: object) -> str:
    logger = logging.Logger("hanse.client.jobs")
    record = logger.makeRecord(logger.name, level, __file__, 1, message, (), None, extra=fields)
    return FieldFormatter().format(record)


def test_line_has_the_sentence_and_its_fields() -> None:
    text = line("job started", job="digits-1", attempt=2)

    assert text.endswith(" INFO hanse.client.jobs: job started job=digits-1 attempt=2")


def test_value_that_would_blur_the_line_is_quoted() -> None:
    assert line("x", reason="it has gone", tail="a\nb", empty="").endswith(
        "x reason='it has gone' tail='a\\nb' empty=''"
    )


def test_traceback_follows_on_lines_of_its_own() -> None:
    try:
        raise ValueError("bad")
    except ValueError as error:
        record = logging.LogRecord(
            "n", logging.ERROR, __file__, 1, "failed", (), (ValueError, error, error.__traceback__)
        )
    record.job = "digits-1"

    first, *rest = FieldFormatter().format(record).splitlines()
    assert first.endswith("failed job=digits-1")
    assert rest[-1] == "ValueError: bad"


def test_bound_fields_stand_beside_the_lines_own(caplog: pytest.LogCaptureFixture) -> None:
    log = FieldLogger(logging.getLogger("hanse.test"), {"job": "digits-1"})
    log.warning("task failed", extra={"reason": "no data"})
    log.warning("and again")

    assert [FieldFormatter().format(record).partition(": ")[2] for record in caplog.records] == [
        "task failed job=digits-1 reason='no data'",
        "and again job=digits-1",
    ]


def test_process_logs_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        log_to_stderr()
        logging.getLogger("hanse.test").info("seen", extra={"job": "digits-1"})
        logging.getLogger("hanse.test").debug("not seen")
    finally:
        root.handlers[:] = before
        root.setLevel(level)

    assert capsys.readouterr().err.splitlines()[0].endswith("INFO hanse.test: seen job=digits-1")
