import pytest
from rich.console import Console

from hanse.cli.job_text import job_line, job_lines, job_status
from hanse.cli.output import duration_text, metrics_text, time_text
from hanse.cli.progress import SHOWN_CLIENTS, JobProgress
from hanse.ids import Digest, JobId
from hanse.messages import ClientView, JobEvent, JobView, RoundView, Waiting

JOB = JobId("digits-1")


def view(state: str = "running", **more: object) -> JobView:
    return JobView(JOB, "digits", state, "ada@demo", 1_700_000_000.0, **{"rounds": 3, **more})  # type: ignore[arg-type]


def event(kind: str, **more: object) -> JobEvent:
    return JobEvent(JOB, kind, 1.0, **more)  # type: ignore[arg-type]


def drawn(progress: JobProgress) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(progress.render())
    return capture.get()


def test_what_a_client_says_reaches_no_terminal_as_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    said = "\x1b[2J\x9bone\r\ntwo"
    with JobProgress() as progress:
        progress.add(view(waiting=(Waiting(said, 0.0, 0.0, said),)))
        progress.add(event("client_lost", client="site-1", text=said))
        assert "\x1b" not in drawn(progress)
        assert "\x9b" not in drawn(progress)
    written = capsys.readouterr().err
    assert len(written.splitlines()) == 2
    assert [char for char in written if not char.isprintable() and char != "\n"] == []


def test_where_there_is_no_terminal_each_fact_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress() as progress:
        progress.add(view("submitted", waiting=(Waiting("2 more clients", 0.0, 1_700_000_100.0, "it is given up"),)))
        progress.add(event("job_started"))
        progress.add(event("round_done", round=0))
        progress.add(event("task_sent", round=1, client="site-1"))
        progress.add(event("client_lost", client="site-1", text="no stream for 15 s"))
        progress.add(event("result_accepted", round=1, client="site-2", text="training-failed"))
        progress.add(event("round_done", round=1, metrics={"loss": 0.25}))
        progress.say_waiting("cannot reach x; trying again in 0.1 s")
        progress.say_waiting("cannot reach x; trying again in 0.2 s")
        progress.add(view("completed"))
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.splitlines() == [
        f"digits-1 submitted: waits for 2 more clients, until {time_text(1_700_000_100.0)}",
        "digits-1 running",
        "site-1 lost: no stream for 15 s",
        "site-2: training-failed",
        "round 1/3  loss 0.25",
        "waiting for the server: cannot reach x; trying again in 0.1 s",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with JobProgress(is_quiet=True) as progress:
        progress.add(view())
        progress.add(event("round_done", round=1))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_rounds_clients_and_metrics() -> None:
    progress = JobProgress(is_quiet=True)
    assert "asking the server" in drawn(progress)
    progress.add(view(clients=(ClientView("site-1", "running"), ClientView("site-2", "starting"))))
    progress.add(event("task_sent", round=2, client="site-1"))
    progress.add(event("round_done", round=1, metrics={"loss": 0.25, "accuracy": 0.5}))
    progress.add(event("round_done", round=2, metrics={"loss": 0.125}))
    shown = drawn(progress)
    assert "round 2/3" in shown
    assert "works (round 2)" in shown
    assert "site-2  starting" in shown
    assert "accuracy" in shown
    assert "0.125" in shown
    progress.say_waiting("it is away")
    assert "waiting for the server: it is away" in drawn(progress)
    progress.add(view())
    assert "waiting for the server" not in drawn(progress)


def test_a_thousand_clients_do_not_fill_the_terminal() -> None:
    progress = JobProgress(is_quiet=True)
    progress.add(view(clients=tuple(ClientView(f"site-{number:04}", "running") for number in range(1000))))
    shown = drawn(progress)
    assert len(shown.splitlines()) < SHOWN_CLIENTS + 10
    assert "980 more" in shown


def test_a_waiting_job_shows_for_what_and_until_when() -> None:
    waiting = Waiting("site-3", since=1_700_000_000.0, until=1_700_000_100.0, then="it is given up")
    shown = "\n".join(job_lines(view("submitted", waiting=(waiting,))))
    times = f"since {time_text(1_700_000_000.0)}, until {time_text(1_700_000_100.0)}"
    assert f"waits for  site-3\n           {times}; then it is given up\n" in shown
    assert "reason" not in shown


def test_an_ended_job_shows_its_reason_and_where_its_result_is() -> None:
    rounds = tuple(RoundView(number, {"loss": 1.0}, 0.5, 1.0) for number in range(40))
    failed = "\n".join(job_lines(view("failed", reason="it broke", code="workflow-failed", history=rounds)))
    assert "reason     it broke (workflow-failed)" in failed
    assert "the last 20" in failed
    assert "round 39 " in failed
    assert "round 19 " not in failed
    completed = view("completed", result=Digest("0" * 64), result_bytes=12_345)
    assert "12,345 bytes (hanse job download digits-1)" in "\n".join(job_lines(completed))
    assert job_line(view("failed", reason="it broke"))[-1] == "it broke"


def test_a_running_job_shows_each_client_that_it_waits_for_as_it_stands() -> None:
    since = 1_700_000_000.0
    whom = (
        ClientView("site-1", "running", since=since),
        ClientView("site-2", "starting", since=since, attempt=2),
        ClientView("site-3", "lost", "not connected for 15 s", since),
        *(ClientView(f"site-{number}", "suspect") for number in range(4, 30)),
    )
    until = since + 60.0
    answers = "answers to 'train' of round 2 from 29 of 30 clients"
    waiting = (Waiting("the store", since, until, "it fails"), Waiting(answers, since, until, "it goes on", whom))
    lines = list(job_lines(view("running", waiting=waiting)))

    begin = lines.index("waits for  the store")
    assert lines[begin + 1] == f"           since {time_text(since)}, until {time_text(until)}; then it fails"
    assert lines[begin + 2] == "waits for  answers to 'train' of round 2 from 29 of 30 clients"
    assert lines[begin + 3] == f"           since {time_text(since)}, until {time_text(until)}; then it goes on"
    assert lines[begin + 4] == f"           site-1: connected and working, since {time_text(since)}"
    assert lines[begin + 5] == f"           site-2: its process is being started, start 2, since {time_text(since)}"
    assert lines[begin + 6].endswith(f"since {time_text(since)}: not connected for 15 s")
    assert lines[begin + 7] == "           site-4: suspect, for it is not connected"
    assert "           and 9 more" in lines
    assert job_line(view("running", waiting=waiting[:1]))[-1] == f"the store, until {time_text(until)}"


def test_advice_names_the_code_that_it_is_for_where_the_cause_is_of_the_jobs_own_making() -> None:
    failed = view("failed", reason="no", code="too-few-clients", client="site-2", cause="of-my-own", advice="Mend it.")

    assert "advice     Mend it. (hanse explain too-few-clients)" in list(job_lines(failed))


def test_a_job_that_ended_badly_shows_where_what_to_do_and_the_log() -> None:
    failed = view(
        "failed",
        reason="only 1 of the 2 answers",
        code="too-few-clients",
        client="site-2",
        cause="out-of-memory",
        log_tail="epoch 3\n\x1b[2JKilled\tby",
        advice="Use less.",
    )
    lines = list(job_lines(failed))

    assert "at         site-2 (out-of-memory)" in lines
    assert "advice     Use less. (hanse explain out-of-memory)" in lines
    assert lines[-3:] == ["log        its last lines at site-2:", "           epoch 3", "           \x1b[2JKilled\tby"]
    at_the_server = view("failed", reason="it broke", code="workflow-failed", advice="Mend it.", log_tail="Traceback")
    assert "advice     Mend it. (hanse explain workflow-failed)" in job_lines(at_the_server)
    assert "log        its last lines at the server:" in job_lines(at_the_server)


def test_how_a_job_ended_is_the_exit_status() -> None:
    assert [job_status(state) for state in ("completed", "running", "failed", "aborted")] == [0, 0, 20, 21]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.042, "0.04 s"), (12.3, "12 s"), (185.0, "3 min 05 s"), (7800.0, "2 h 10 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_what_is_no_duration_is_told_all_the_same() -> None:
    assert [duration_text(seconds) for seconds in (-86_400.0, float("nan"), float("inf"))] == ["-"] * 3


def test_metrics_are_in_the_order_of_their_names() -> None:
    assert metrics_text({"loss": 0.123456, "accuracy": 1.0}) == "accuracy 1  loss 0.1235"


def test_a_time_that_is_no_date_is_told_all_the_same() -> None:
    waiting = Waiting("2 more clients", 0.0, 1.7e9 + 1e12, "it is given up")  # a deadline that is meant never to come

    assert job_line(view(waiting=(waiting,)))[-1] == "2 more clients, until after the year 9999"
    assert "           since -, until after the year 9999; then it is given up" in job_lines(view(waiting=(waiting,)))
    assert time_text(float("inf")) == "after the year 9999"
    assert [time_text(posix_s) for posix_s in (0.0, float("nan"), -1e300)] == ["-"] * 3
