"""A certificate that ends: the token with it, then the stream, and what a waiting job and the list of clients say.

Over real mutual TLS; what moves is the server's time of day, by which certificates and tokens end.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hanse.admin.commands import AdminCommands
from hanse.codes import CODES
from hanse.errors import StaleEpoch, StoreFailed, Unauthenticated
from hanse.identity.tokens import parse_token
from hanse.ids import JobId
from hanse.job import JobState, WorkflowSpec
from hanse.messages import Channel, ClientList, DisableClient, Heartbeat, ListClients, Quit, Registered, Renew
from hanse.server import FederatedServer
from hanse.server.overseer import ScriptedOverseer
from hanse.storage.memory import MemoryStore
from hanse.storage.records import Lease

from .job_world import Site, Threads, outcome, submit
from .world import (
    WITHIN_S,
    Dialler,
    Project,
    appoint,
    args,
    names,
    on_loop,
    peer_of,
    settings,
    wait,
)

MakeServer = Callable[..., FederatedServer]
LIFETIME = timedelta(minutes=10)


class Short:
    """A server whose clock can be moved, and a certificate of site-1 that lasts for ten minutes."""

    def __init__(
        self, deployed: MakeServer, project: Project, folder: Path, *, store: MemoryStore | None = None, **more: Any
    ) -> None:
        self.identity = project.issued(folder, "site-1", now=datetime.now(UTC), lifetime=LIFETIME)
        self.end = self.identity.expires.timestamp()
        self._deploy = partial(
            deployed,
            arguments=args(folder / "ws", launcher=Threads(), settings=settings(**more)),
            cmd_modules=[AdminCommands()],
            snapshot_persistor=store,
        )
        self.server = self._deploy()

    def start_again(self) -> None:
        """End the server, and have another one go on with its workspace and its store, at the same time of day."""
        self.server.close()
        self.server = self._deploy(wall=self.server.wall)

    def stand_at(self, moment: float) -> None:
        """Have it be *moment* at the server, from now on for ever."""
        self.server.wall = lambda: moment

    def absent(self, job_id: JobId) -> list[tuple[str, str]]:
        """Return whom the job waits for of whom it is known why they are not there, and why."""
        (waiting,) = wait(self.server.jobs.board.view(job_id)).waiting
        assert waiting.what.startswith("1 of the 2 clients that the job needs can take it")
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


def test_a_client_that_is_disabled_is_not_said_to_need_a_certificate(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    site = dialler.site(short.server, identity=short.identity)
    dialler.site(short.server, "site-2")
    site.ask(Channel.SERVER, "quit", Quit())
    short.stand_at(short.end)
    job_id = submit(short.server, tmp_path)
    assert short.absent(job_id) == [("site-1", short.because)]

    disable(dialler, short.server, "site-1")

    because = "it is disabled (disabled by ada@demo); 'hanse client enable site-1' lets it in again"
    assert short.absent(job_id) == [("site-1", because)]
    found = short.listed(dialler)
    assert (list(found.disabled), found.expired) == (["site-1"], {})
    disable(dialler, short.server, "site-1", disabled=False)
    assert short.listed(dialler).expired == {"site-1": short.because}


def test_a_job_says_of_a_client_that_is_disabled_that_it_is_and_nothing_of_it_once_it_is_not(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    server = short.server
    dialler.site(server, "site-2")
    job_id = submit(server, tmp_path)
    disable(dialler, server, "site-1")
    with pytest.raises(Unauthenticated, match="is disabled"):
        dialler.site(server, identity=short.identity)

    (waiting,) = wait(server.jobs.board.view(job_id)).waiting
    (absent,) = waiting.whom
    assert (absent.name, absent.state) == ("site-1", "absent")
    assert absent.reason == "it is disabled (disabled by ada@demo); 'hanse client enable site-1' lets it in again"

    disable(dialler, server, "site-1", disabled=False)
    (waiting,) = wait(server.jobs.board.view(job_id)).waiting
    assert waiting.whom == ()


# what the next server knows -------------------------------------------------------------------------------------------


class NotedStore(MemoryStore):
    """A store that notes which certificates' ends it was told, and fails at that, or holds its lease up, for a test."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_for_lease = threading.Event()
        self.may_lease = asyncio.Event()
        self.may_lease.set()
        self.failure: Exception | None = None
        self.told: list[dict[str, float]] = []
        self._heard = threading.Condition()

    async def keep_certificate_ends(self, epoch: int, ends: Mapping[str, float], *, since_s: float) -> None:
        with self._heard:
            self.told.append(dict(ends))
            self._heard.notify_all()
        if self.failure is not None:
            raise self.failure
        await super().keep_certificate_ends(epoch, ends, since_s=since_s)

    async def take_lease(self, *arguments: Any, **more: Any) -> Lease:
        self.asked_for_lease.set()
        await self.may_lease.wait()
        return await super().take_lease(*arguments, **more)

    def hears(self, times: int) -> None:
        """Return when the store has been told something that many times."""
        with self._heard:
            assert self._heard.wait_for(lambda: len(self.told) >= times, WITHIN_S), self.told

    def kept(self) -> dict[str, float]:
        return wait(self.certificate_ends())


@pytest.fixture
def store() -> NotedStore:
    return on_loop(NotedStore)


@pytest.fixture
def noted(deployed: MakeServer, project: Project, store: NotedStore, tmp_path: Path) -> Short:
    """The same on that store."""
    return Short(deployed, project, tmp_path, store=store)


def test_a_server_that_is_started_again_says_of_a_client_whose_certificate_has_ended_meanwhile_what_the_former_said(
    short: Short, dialler: Dialler, tmp_path: Path
) -> None:
    dialler.site(short.server, identity=short.identity)
    dialler.site(short.server, "site-2")
    dialler.close()
    short.stand_at(short.end)
    job_id = submit(short.server, tmp_path)
    told = short.listed(dialler).clients[0].remark
    dialler.close()

    short.start_again()
    dialler.site(short.server, "site-2")

    assert short.listed(dialler).expired == {"site-1": told} == {"site-1": short.because}
    assert short.absent(job_id) == [("site-1", short.because)]


def test_a_run_that_a_server_takes_up_fails_for_want_of_a_client_whose_certificate_has_ended_meanwhile(
    deployed: MakeServer, project: Project, dialler: Dialler, tmp_path: Path
) -> None:
    short = Short(deployed, project, tmp_path, lost_after_s=0.05)
    site = Site(dialler, short.server, "site-1", identity=short.identity)
    job_id = submit(short.server, tmp_path, min_clients=1)
    site.task()
    short.server.close()
    short.stand_at(short.end)

    short.start_again()
    record = outcome(short.server, job_id)

    assert (record.state, record.code) == (JobState.FAILED, "too-few-clients")
    assert (record.client, record.cause) == ("site-1", "certificate-expired")
    assert short.because in record.reason


def test_the_store_is_told_of_a_certificate_once_however_often_its_client_comes(
    noted: Short, store: NotedStore, dialler: Dialler, project: Project, tmp_path: Path
) -> None:
    site = dialler.site(noted.server, identity=noted.identity)
    for _ in range(3):
        site.ask(Channel.SERVER, "heartbeat", Heartbeat())
    site.ask(Channel.SERVER, "renew", Renew())
    dialler.site(noted.server, identity=noted.identity)
    dialler.close()
    noted.start_again()
    back = dialler.site(noted.server, identity=noted.identity)
    back.ask(Channel.SERVER, "heartbeat", Heartbeat())
    dialler.site(noted.server, "ada@demo")  # whose own certificate is of no interest
    assert store.told == [{"site-1": noted.end}]

    folder = tmp_path / "new"
    folder.mkdir()
    anew = project.issued(folder, "site-1", now=datetime.now(UTC), lifetime=LIFETIME / 2)  # the last one counts
    dialler.site(noted.server, identity=anew)
    assert store.told[1:] == [{"site-1": anew.expires.timestamp()}]
    assert store.kept() == {"site-1": anew.expires.timestamp()}


def test_a_certificate_that_only_tls_has_seen_is_kept_too(noted: Short, store: NotedStore, dialler: Dialler) -> None:
    site = dialler.site(noted.server, "site-1")  # with the kit's certificate, of a year
    dialler.site(noted.server, identity=noted.identity, credentials=site.credentials)

    store.hears(2)
    assert store.told[1] == {"site-1": noted.end} == store.kept()


def test_who_comes_back_with_a_new_certificate_is_welcome_at_the_next_server(
    noted: Short, store: NotedStore, dialler: Dialler, project: Project
) -> None:
    dialler.site(noted.server, identity=noted.identity)
    dialler.close()
    noted.stand_at(noted.end)
    noted.start_again()
    assert noted.listed(dialler).expired == {"site-1": noted.because}

    dialler.site(noted.server, "site-1").ask(Channel.SERVER, "heartbeat", Heartbeat())

    found = noted.listed(dialler)
    assert ([each.remark for each in found.clients], found.expired) == ([""], {})
    assert store.kept() == {"site-1": project.site("site-1").expires.timestamp()}


def test_what_a_server_sees_while_it_is_about_to_serve_it_keeps_when_it_does(
    deployed: MakeServer, project: Project, store: NotedStore, dialler: Dialler, tmp_path: Path
) -> None:
    now, year = datetime.now(UTC).timestamp(), 365 * 86_400.0
    wait(_opened_and_kept(store, {"site-1": now, "site-2": now, "site-3": now - year}, since_s=0.0))
    overseer = ScriptedOverseer()
    server = deployed(snapshot_persistor=store, overseer_agent=overseer, max_num_clients=3)
    server.wall = lambda: now
    store.asked_for_lease.clear()
    on_loop(store.may_lease.clear)
    turning = threading.Thread(target=lambda: appoint(overseer, server), daemon=True)
    turning.start()
    assert store.asked_for_lease.wait(WITHIN_S)

    site = dialler.site(server, "site-1")
    short_lived = project.issued(tmp_path, "site-1", now=datetime.now(UTC), lifetime=LIFETIME)
    dialler.site(server, identity=short_lived, credentials=site.credentials)
    on_loop(store.may_lease.set)
    turning.join(WITHIN_S)

    store.hears(2)
    assert store.kept() == {"site-1": short_lived.expires.timestamp(), "site-2": now}
    assert server.clients.expired() == {"site-2": now}


async def _opened_and_kept(store: NotedStore, ends: Mapping[str, float], *, since_s: float) -> None:
    async with store:
        lease = await store.take_lease("before", name="before", target="", ttl_s=1.0)
        await store.keep_certificate_ends(lease.epoch, ends, since_s=since_s)
        await store.release_lease(lease.epoch)


def test_a_client_comes_in_though_the_store_does_not_keep_the_end_of_its_certificate_and_the_next_one_has_it_kept(
    noted: Short, store: NotedStore, dialler: Dialler, project: Project, caplog: pytest.LogCaptureFixture
) -> None:
    store.failure = StoreFailed("writing", "the database is away")
    with caplog.at_level(logging.WARNING, logger="hanse.server.federated_server"):
        site = dialler.site(noted.server, identity=noted.identity)
    site.ask(Channel.SERVER, "heartbeat", Heartbeat())
    assert names(noted.server) == ["site-1"]
    assert store.kept() == {}
    warnings = [vars(record) for record in caplog.records if record.name == "hanse.server.federated_server"]
    assert {(each["message"], *each["clients"], each["reason"]) for each in warnings} == {
        ("when certificates end was not kept", "site-1", store.failure.reason)
    }

    store.failure = None
    dialler.site(noted.server, "site-2")

    assert store.kept() == {"site-1": noted.end, "site-2": project.site("site-2").expires.timestamp()}


def test_a_server_whose_tenure_is_over_leaves_it_to_its_successor_to_keep_ends(
    noted: Short, store: NotedStore, dialler: Dialler, caplog: pytest.LogCaptureFixture
) -> None:
    store.failure = StaleEpoch(ours=1, current=2)

    dialler.site(noted.server, identity=noted.identity)
    store.failure = None
    dialler.site(noted.server, identity=noted.identity)

    assert [record.name for record in caplog.records] == ["hanse.server.clients"]  # the certificate ends soon
    assert store.kept() == {}


def test_a_server_without_tls_lets_in_whose_certificate_ended_when_it_had_tls(
    noted: Short, store: NotedStore, dialler: Dialler, deployed_plain: MakeServer, tmp_path: Path
) -> None:
    dialler.site(noted.server, identity=noted.identity)
    dialler.close()
    noted.server.close()

    plain = deployed_plain(snapshot_persistor=store)
    plain.wall = lambda: noted.end
    dialler.plain(plain, "site-1")

    assert names(plain) == ["site-1"]
    assert plain.clients.expired() == {}


def disable(dialler: Dialler, server: FederatedServer, client: str, *, disabled: bool = True) -> None:
    """Have an administrator disable the client, or enable it."""
    dialler.site(server, "ada@demo").ask(Channel.ADMIN, "client.disable", DisableClient(client, disabled))


def close_job(server: FederatedServer, site: Site) -> None:
    """End the stream of the site's process, and return when the server has noticed."""
    gone = threading.Event()
    on_loop(lambda: server.jobs.services.cell.on_link_down(lambda peer, reason: gone.set()))
    assert site.job is not None
    wait(site.job.close())
    assert gone.wait(WITHIN_S)
