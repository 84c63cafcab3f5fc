"""The tables of who may do what: every role × right, every kind × topic, and nothing for whoever is not in them."""

from itertools import product

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse.coordination.policy import (
    ADMIN_RIGHTS,
    PEER,
    ROLE_RIGHTS,
    PeerKind,
    Right,
    demand,
    demand_abort,
    demand_topic,
    demand_use,
    may_run,
    may_use,
    rights_of,
)
from hanse.errors import Unauthorized
from hanse.job import JobSpec, WorkflowSpec
from hanse.messages import CATALOGUE, Channel
from hanse.settings import SitePolicy

ALLOWED = {
    "admin": {"see", "submit", "abort_own", "abort_any", "manage_clients", "stop_server"},
    "lead": {"see", "submit", "abort_own"},
    "member": {"see"},
}


@pytest.mark.parametrize(("role", "right"), list(product(ALLOWED, Right)))
def test_each_role_has_the_rights_that_are_written_for_it(role: str, right: Right) -> None:
    if right in ALLOWED[role]:
        demand(right, who="ada@demo", role=role)
    else:
        with pytest.raises(Unauthorized, match="ada@demo may not"):
            demand(right, who="ada@demo", role=role)


def test_the_roles_are_these_three() -> None:
    assert set(ROLE_RIGHTS) == set(ALLOWED)


@pytest.mark.parametrize("right", Right)
@pytest.mark.parametrize("role", ["", "root", "Admin", "admin ", "client"])
def test_an_unknown_role_may_do_nothing(role: str, right: Right) -> None:
    assert rights_of(role) == frozenset()
    with pytest.raises(Unauthorized):
        demand(right, who="eve", role=role)


def test_a_refusal_says_what_is_refused_and_which_roles_may() -> None:
    with pytest.raises(Unauthorized) as refused:
        demand(Right.SUBMIT, who="bob@demo", role="member")

    assert str(refused.value) == "bob@demo may not submit jobs; that needs role admin or lead"


@pytest.mark.parametrize(
    ("role", "own", "others"), [("admin", True, True), ("lead", True, False), ("member", False, False)]
)
def test_aborting_depends_on_whose_job_it_is(role: str, own: bool, others: bool) -> None:
    for submitter, allowed in (("ada@demo", own), ("bob@demo", others)):
        if allowed:
            demand_abort(submitter, who="ada@demo", role=role)
        else:
            with pytest.raises(Unauthorized, match="abort"):
                demand_abort(submitter, who="ada@demo", role=role)


def test_every_administrative_request_needs_a_right() -> None:
    requests = {topic for topic in CATALOGUE if topic[0] is Channel.ADMIN} - {(Channel.ADMIN, "job.event")}

    assert set(ADMIN_RIGHTS) == requests


@pytest.mark.parametrize(("topic", "role"), list(product(ADMIN_RIGHTS, ALLOWED)))
def test_an_administrative_request_passes_with_its_right_and_not_without(topic: tuple[str, str], role: str) -> None:
    if ADMIN_RIGHTS[topic] in ALLOWED[role]:
        demand_topic(topic, who="ada@demo", role=role)
    else:
        with pytest.raises(Unauthorized):
            demand_topic(topic, who="ada@demo", role=role)


def test_an_administrative_request_that_there_is_not_is_refused_to_everybody() -> None:
    with pytest.raises(Unauthorized, match=r"may not ask for admin/job\.delete"):
        demand_topic(("admin", "job.delete"), who="ada@demo", role="admin")


def test_every_topic_of_the_catalogue_has_somebody_who_may_send_it_and_no_other_topic_has() -> None:
    assert frozenset().union(*PEER.values()) == frozenset(CATALOGUE)
    assert set(PEER) == set(PeerKind)


def test_an_anonymous_peer_may_identify_itself_and_nothing_else() -> None:
    allowed = {topic for topic in CATALOGUE if may_use("anonymous", *topic)}

    assert allowed == {("server", "challenge"), ("server", "register")}


@pytest.mark.parametrize(("kind", "topic"), list(product(PeerKind, CATALOGUE)))
def test_a_peer_may_send_what_its_kind_is_for(kind: PeerKind, topic: tuple[str, str]) -> None:
    channel, name = topic
    by_channel = {
        PeerKind.ANONYMOUS: set(),
        PeerKind.CLIENT: set(),
        PeerKind.CLIENT_JOB: {"task"},
        PeerKind.SERVER_JOB: {"run"},
        PeerKind.ADMIN: {"admin"},
        PeerKind.SERVER: {"job", "run", "task", "admin"},
    }
    from_server = {"answer", "client", "abort", "task", "cancelled", "job.event", "deploy", "start", "goodbye"}
    if channel != "server":
        sent_by_server = kind is PeerKind.SERVER
        expected = channel in by_channel[kind] and (name in from_server) == sent_by_server
        assert may_use(kind, channel, name) == expected
    else:
        senders = {
            "challenge": {"anonymous", "client", "admin"},
            "register": {"anonymous", "client", "admin"},
            "renew": {"client", "client_job", "server_job", "admin"},
            "quit": {"client"},
            "heartbeat": {"client"},
            "job_ended": {"client"},
            "job_failure": {"client", "client_job"},
        }
        assert may_use(kind, channel, name) == (kind in senders[name])


@given(st.text(), st.text(), st.text())
def test_unknown_kinds_and_topics_are_refused(kind: str, channel: str, topic: str) -> None:
    assert not may_use(kind, "server", "challenge") or kind in PEER
    assert not may_use("client", channel, topic) or (channel, topic) in CATALOGUE


def test_demand_use_lets_pass_what_may_pass() -> None:
    demand_use(PeerKind.CLIENT, Channel.SERVER, "heartbeat", who="site-1")


def test_demand_use_names_the_kinds_that_may() -> None:
    with pytest.raises(Unauthorized) as refused:
        demand_use("anonymous", "server", "job_failure", who="10.0.0.7")

    assert str(refused.value) == (
        "10.0.0.7 may not send server/job_failure; that needs a peer of kind client or client_job"
    )


def test_demand_use_says_so_when_nobody_may() -> None:
    with pytest.raises(Unauthorized, match="needs a request that this server knows"):
        demand_use("admin", "admin", "shell", who="ada@demo")


def spec(client: str = "my_package:app") -> JobSpec:
    return JobSpec(name="j", workflow=WorkflowSpec("fedavg"), client=client, model="m:model")


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("client", ["my_package:app", "train.py"])
def test_a_site_that_allows_job_code_runs_any(installed: bool, client: str) -> None:
    assert may_run(SitePolicy(), submitter="ada@demo", spec=spec(client), installed=installed) is None


def test_a_site_that_denies_job_code_runs_what_is_installed_there() -> None:
    policy = SitePolicy(job_code="deny")

    assert may_run(policy, submitter="ada@demo", spec=spec(), installed=True) is None
    assert may_run(policy, submitter="ada@demo", spec=spec(), installed=False) == (
        "code that comes with a job may not run here, and my_package:app is not installed"
    )


@pytest.mark.parametrize("installed", [True, False])
def test_a_script_always_comes_with_its_job(installed: bool) -> None:
    reason = may_run(SitePolicy(job_code="deny"), submitter="ada@demo", spec=spec("train.py"), installed=installed)

    assert reason == "code that comes with a job may not run here, and train.py does"


def test_a_site_runs_only_the_jobs_of_those_that_it_lists() -> None:
    policy = SitePolicy(submitters=("ada@demo", "bob@demo"))

    assert may_run(policy, submitter="bob@demo", spec=spec(), installed=True) is None
    assert may_run(policy, submitter="eve@demo", spec=spec(), installed=True) == (
        "only jobs of ada@demo, bob@demo may run here, and this one is eve@demo's"
    )


def test_a_word_about_job_code_that_is_not_allow_denies_it() -> None:
    policy = SitePolicy()
    msgspec.structs.force_setattr(policy, "job_code", "allow, mostly")

    assert may_run(policy, submitter="ada@demo", spec=spec(), installed=False) is not None
