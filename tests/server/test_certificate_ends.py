"""A certificate that ends: the token with it, then the stream, and what a waiting job and the list of clients say.

Over real mutual TLS; what moves is the server's time of day, by which certificates and tokens end.
"""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hanse.admin.commands import AdminCommands
from hanse.codes import CODES
from hanse.errors import Unauthenticated
from hanse.identity.tokens import parse_token
from hanse.ids import JobId
from hanse.job import JobState, WorkflowSpec
from hanse.messages import Channel, ClientList, Heartbeat, ListClients, Quit, Registered, Renew
from hanse.server import FederatedServer

from .job_world import Site, Threads, outcome, submit
from .world import WITHIN_S, Dialler, Project, args, on_loop, peer_of, settings, wait

MakeServer = Callable[..., FederatedServer]
LIFETIME = timedelta(minutes=10)


class Short:
    """A server whose clock can be moved, and a certificate of site-1 that lasts for ten minutes."""

    def __init__(self, deployed: MakeServer, project: Project, folder: Path, **more: Any) -> None:
        self.identity = project.issued(folder, "site-1", now=datetime.now(UTC), lifetime=LIFETIME)
        self.end = self.identity.expires.timestamp()
        arguments = args(folder / "ws", launcher=Threads(), settings=settings(**more))
        self.server = deployed(arguments=arguments, cmd_modules=[AdminCommands()])

    def stand_at(self, moment: float) -> None:
        """Have it be *moment* at the server, from now on for ever."""
        self.server.wall = lambda: moment

    def absent(self, job_id: JobId) -> list[tuple[str, str]]:
        """Return whom the job waits for of whom it is known why they are not there, and why."""
        (waiting,) = wait(self.server.jobs.board.view(job_id)).waiting
        assert waiting.what == "1 of the 2 clients that the job needs can take it: site-1 is not connected"
        return [(each.name, each.reason) for each in waiting.whom]

    def listed(self, dialler: Dialler) -> ClientList:
        told = dialler.site(self.server, "ada@demo").ask(Channel.ADMIN, "client.list", ListClients()).payload
        assert isinstance(told, ClientList)
        return told

    @property
    def when(self) -> str:
        return f"{self.identity.expires:%Y-%m-%d %H:%M} UTC"

    @property
    def refusal(self) -> str:
        return f"the certificate of 'site-1' expired on {self.when}; ask the project for a new one"

    @property
    def because(self) -> str:
        return f"its certificate expired on {self.when}, and it cannot connect until it has a new one"


@pytest.fixture
def short(deployed: MakeServer, project: Project, tmp_path: Path) -> Short:
    return Short(deployed, project, tmp_path)


def given(registered: Registered | None) -> Registered:
    assert registered is not None
    return registered


def test_a_token_lasts_no_longer_than_the_certificate(short: Short, dialler: Dialler) -> None:
    site = dialler.site(short.server, identity=short.identity)
    other = dialler.site(short.server, "site-2")

    assert LIFETIME.total_seconds() - 60 < given(site.registered).expires_in_s <= LIFETIME.total_seconds()
    assert parse_token(given(site.registered).token).expires_at <= short.end + 1  # which is rounded up to a second
    assert given(other.registered).expires_in_s == 3600

    short.stand_at(short.end - 60)
    renewed = site.ask(Channel.SERVER, "renew", Renew()).payload
    assert isinstance(renewed, Registered)
    assert renewed.expires_in_s == 60
    assert parse_token(renewed.token).expires_at == int(short.end)


def test_an_administrators_token_lasts_no_longer_than_the_certificate_either(
    short: Short, dialler: Dialler, project: Project
) -> None:
    ada = project.admin("ada@demo")
    short.stand_at(ada.expires.timestamp() - 60)
    session = dialler.site(short.server, "ada@demo")
    assert given(session.registered).expires_in_s == 60

    short.stand_at(ada.expires.timestamp())
    refused = session.refused(Channel.ADMIN, "client.list", ListClients())
    assert refused.reason.startswith("the certificate of 'ada@demo' expired on ")


@pytest.mark.parametrize("late_s", [0.0, 0.5, 5.0, 86_400.0])
def test_a_client_is_refused_at_its_next_heartbeat_after_its_certificate_has_ended(
    short: Short, dialler: Dialler, late_s: float
) -> None:
    site = dialler.site(short.server, identity=short.identity)
    site.ask(Channel.SERVER, "heartbeat", Heartbeat())
    short.stand_at(short.end + late_s)

    refused = site.refused(Channel.SERVER, "heartbeat", Heartbeat())

    assert isinstance(refused, Unauthenticated)
    assert refused.reason == short.refusal
    # Whatever it means to do, nothing more goes to it, and its token opens no other stream.
    ended = wait(site.ended())
    assert ended is not None
    assert ended.reason == short.refusal
    assert peer_of(short.server, "site-1") is None
    short.stand_at(short.end + 1 + late_s)  # a token ends with a full second
    again = dialler.refused(dialler.site_wire(short.server, identity=short.identity, credentials=site.credentials))
    assert isinstance(again, Unauthenticated)


def test_a_stream_that_was_opened_with_a_token_is_bounded_by_its_certificate_too(
    short: Short, dialler: Dialler
) -> None:
    credentials = dialler.site(short.server, "site-1").credentials  # with the kit's certificate, of a year
    site = dialler.site(short.server, identity=short.identity, credentials=credentials)
    site.ask(Channel.SERVER, "heartbeat", Heartbeat())
    short.stand_at(short.end)

    assert site.refused(Channel.SERVER, "heartbeat", Heartbeat()).reason == short.refusal


def test_a_jobs_process_goes_on_with_the_certificate_that_the_server_gave_it(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    site, other = Site(dialler, short.server, "site-1", identity=short.identity), Site(dialler, short.server, "site-2")
    submit(short.server, tmp_path)
    site.started(), other.started()
    short.stand_at(short.end)
    site.wire.refused(Channel.SERVER, "heartbeat", Heartbeat())
    wait(site.wire.ended())

    assert site.job is not None
    renewed = site.job.ask(Channel.SERVER, "renew", Renew()).payload
    assert isinstance(renewed, Registered)
    assert renewed.expires_in_s == 3600


def test_who_has_a_new_certificate_is_welcome(short: Short, dialler: Dialler) -> None:
    site = dialler.site(short.server, identity=short.identity)
    short.stand_at(short.end)
    site.refused(Channel.SERVER, "heartbeat", Heartbeat())
    wait(site.ended())
    assert short.listed(dialler).clients[0].remark == short.because

    anew = dialler.site(short.server, "site-1")
    anew.ask(Channel.SERVER, "heartbeat", Heartbeat())
    (client,) = short.listed(dialler).clients
    assert (client.name, client.state, client.remark) == ("site-1", "connected", "")


# what people are told -------------------------------------------------------------------------------------------------


def test_the_list_of_clients_tells_of_a_certificate_that_ends_soon_and_the_log_once(
    short: Short, dialler: Dialler, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hanse.server.clients"):
        dialler.site(short.server, "site-2")
        dialler.site(short.server, identity=short.identity)
        dialler.site(short.server, identity=short.identity)
    remark = f"its certificate expires on {short.when}, in 0 days; ask the project for a new one"
    assert [(record.participant, record.reason) for record in caplog.records] == [("site-1", remark)]  # type: ignore[attr-defined]  # extras

    one, two = short.listed(dialler).clients
    assert (one.certificate_ends_at, one.remark) == (short.end, remark)
    assert two.certificate_ends_at == dialler.project.site("site-2").expires.timestamp()
    assert two.remark == ""


def test_the_list_of_clients_tells_of_one_that_went_away_and_whose_certificate_has_ended_since(
    short: Short, dialler: Dialler
) -> None:
    site = dialler.site(short.server, identity=short.identity)
    dialler.site(short.server, "ada@demo")  # whose own certificate is of no interest
    site.ask(Channel.SERVER, "quit", Quit())
    assert short.listed(dialler).expired == {}

    short.stand_at(short.end)
    found = short.listed(dialler)
    assert (found.clients, found.expired) == ((), {"site-1": short.because})


def test_a_job_that_waits_for_a_client_says_that_its_certificate_has_ended(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    site = dialler.site(short.server, identity=short.identity)
    dialler.site(short.server, "site-2")
    short.stand_at(short.end)
    site.refused(Channel.SERVER, "heartbeat", Heartbeat())
    wait(site.ended())

    job_id = submit(short.server, tmp_path)
    assert short.absent(job_id) == [("site-1", short.because)]


def test_a_client_whose_certificate_has_ended_gets_no_job_before_its_next_heartbeat(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    dialler.site(short.server, identity=short.identity)
    dialler.site(short.server, "site-2")
    short.stand_at(short.end)

    job_id = submit(short.server, tmp_path)
    assert short.absent(job_id) == [("site-1", short.because)]


def test_a_job_that_waits_already_says_so_as_soon_as_the_certificate_of_who_is_away_has_ended(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    site = dialler.site(short.server, identity=short.identity)
    dialler.site(short.server, "site-2")
    gone = threading.Event()
    on_loop(lambda: short.server.jobs.services.cell.on_link_down(lambda peer, reason: gone.set()))
    wait(site.close())
    assert gone.wait(WITHIN_S)
    job_id = submit(short.server, tmp_path)
    assert short.absent(job_id) == []

    short.stand_at(short.end)
    assert short.absent(job_id) == [("site-1", short.because)]


def test_a_refusal_says_why_a_client_is_absent_and_nothing_of_one_that_is_there(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    dialler.site(short.server, "site-2")
    for name in ("site-2", "site-3"):  # whoever calls itself that has proven nothing
        short.server.refused.note(name, code="version-mismatch", reason=f"{name} is too old")
    job_id = submit(short.server, tmp_path)

    (waiting,) = wait(short.server.jobs.board.view(job_id)).waiting
    assert [(each.name, each.state, each.reason) for each in waiting.whom] == [
        ("site-3", "absent", "site-3 is too old [version-mismatch]")
    ]


def test_a_run_says_of_a_client_that_is_away_that_its_certificate_has_ended(
    deployed: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    short = Short(deployed, project, tmp_path, lost_after_s=600.0)
    site = Site(dialler, short.server, "site-1", identity=short.identity)
    other = Site(dialler, short.server, "site-2")
    job_id = submit(short.server, tmp_path)
    for each in (site, other):
        each.task()
    short.stand_at(short.end)
    close_job(short.server, site)

    view = wait(short.server.jobs.board.view(job_id))
    (waiting,) = view.waiting
    assert [(each.name, each.state, each.reason) for each in waiting.whom] == [
        ("site-1", "suspect", short.because),
        ("site-2", "running", ""),
    ]
    assert [each.reason for each in view.clients] == [short.because, ""]


def test_a_run_that_fails_for_want_of_a_client_says_that_its_certificate_has_ended(
    deployed: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    short = Short(deployed, project, tmp_path, lost_after_s=0.05)
    site = Site(dialler, short.server, "site-1", identity=short.identity)
    other = Site(dialler, short.server, "site-2")
    job_id = submit(short.server, tmp_path, workflow=WorkflowSpec("fedavg", {"rounds": 1, "quorum": 2, "retries": 0}))
    for each in (site, other):
        each.task()
    short.stand_at(short.end)
    close_job(short.server, site)

    record = outcome(short.server, job_id)

    assert (record.state, record.code) == (JobState.FAILED, "too-few-clients")
    assert (record.client, record.cause) == ("site-1", "certificate-expired")
    assert f"site-1 was not connected for 0.05 s: {short.because}" in record.reason
    view = wait(short.server.jobs.board.view(job_id))
    assert view.advice == CODES["certificate-expired"].advice


def close_job(server: FederatedServer, site: Site) -> None:
    """End the stream of the site's process, and return when the server has noticed."""
    gone = threading.Event()
    on_loop(lambda: server.jobs.services.cell.on_link_down(lambda peer, reason: gone.set()))
    assert site.job is not None
    wait(site.job.close())
    assert gone.wait(WITHIN_S)
