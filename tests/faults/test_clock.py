"""A wall clock that is set a day forward or back in the middle of a run: the run goes on with the same bytes.

Nothing in a run is measured by it. What is are the lives of tokens and certificates: a server whose clock is set beyond
a token's end refuses it, and its clients prove themselves anew by their certificates; of one whose certificate has
ended, a server says so, also one that was started since.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

import pytest

from hanse.cell.loop import run
from hanse.identity.authorities import Authority
from hanse.identity.certificates import key_pem, new_key
from hanse.messages import JobView
from tests.faults.bench import JOB, RUN_WITHIN_S, Bench, Disturbance, provisioned
from tests.faults.clock import DAY_S, Clock
from tests.faults.steps import STEPS, Step

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Clocks: TypeAlias = tuple[Bench, dict[str, Clock]]

AFTER_ONE_ANSWER = STEPS.index(Step("result_accepted", 2, 1))


@pytest.fixture
def clocks(tmp_path: Path) -> Iterator[Clocks]:
    """A server and two clients, each with a clock of its own."""
    with provisioned(tmp_path / "gates") as made:
        names = [*made.running.servers, *made.running.names]
        clocks = {name: Clock(tmp_path / f"clock-of-{name}") for name in names}
        made.running.environments.update({name: clock.environment for name, clock in clocks.items()})
        made.begin()
        yield made, clocks


def run_with_jump(made: Bench, clock: Clock, ahead_s: int) -> JobView:
    """Run the job, and set *clock* in the middle of round 2."""
    with closing(made.held("site-1", 2)) as gate:
        jump = Disturbance(AFTER_ONE_ANSWER, lambda: clock.set(ahead_s))
        return run(made.run([jump, Disturbance(AFTER_ONE_ANSWER, gate.close)]), RUN_WITHIN_S)


@pytest.mark.parametrize(
    ("whose", "ahead_s"),
    [
        pytest.param("server", DAY_S, id="server-forward"),
        pytest.param("server", -DAY_S, id="server-back", marks=pytest.mark.long),
        pytest.param("site-1", DAY_S, id="site-forward", marks=pytest.mark.long),
    ],
)
def test_clock_jumps_and_the_run_completes_with_the_same_bytes(clocks: Clocks, whose: str, ahead_s: int) -> None:
    made, clock_of = clocks
    made.check(run_with_jump(made, clock_of[whose], ahead_s))
    if ahead_s > 0:  # else the certificates, which are new, would not be valid yet
        made.check(run(made.run(), RUN_WITHIN_S))


def test_sites_clock_is_set_back_its_run_goes_on_and_the_next_job_says_what_is_wrong(clocks: Clocks) -> None:
    made, clock_of = clocks
    made.check(run_with_jump(made, clock_of["site-1"], -DAY_S))

    view = run(made.run(), RUN_WITHIN_S)
    assert (view.state, view.code, view.client) == ("failed", "unauthenticated", "site-1")
    assert view.reason.startswith("the certificate of 'site-1' is not valid before ")
    assert view.reason.endswith("compare the clocks")


def test_a_server_that_was_killed_says_of_a_client_whose_certificate_has_ended_since_what_it_would_have_said(
    tmp_path: Path,
) -> None:
    with provisioned(tmp_path / "gates") as made:
        running, clock = made.running, Clock(tmp_path / "clock-of-server")
        running.environments["server"] = clock.environment
        ends = certify(made, "site-1", timedelta(hours=12))
        running.start("server", "site-1")
        running.kill("site-1")
        running.kill("server")
        clock.set(DAY_S)

        running.start("server", "site-2")

        why = f"its certificate expired on {ends:%Y-%m-%d %H:%M} UTC, and it cannot connect until it has a new one"
        listed = running.hanse("client", "list")
        assert ([each["name"] for each in listed["clients"]], listed["expired"]) == (["site-2"], {"site-1": why})
        job_id = running.hanse("job", "submit", str(JOB))["job_id"]
        (waiting,) = running.hanse("job", "show", job_id)["waiting"]
        assert [(each["name"], each["reason"]) for each in waiting["whom"]] == [("site-1", why)]


def certify(made: Bench, client: str, lifetime: timedelta) -> datetime:
    """Give *client*'s kit a certificate that lasts for *lifetime* from now, and return when it ends."""
    key, now = new_key(), datetime.now(UTC).replace(microsecond=0)
    kit = made.running.kit(client)
    certificate = Authority.load(kit.parent / "authority").issue(
        name=client, organisation="Bench", role="client", public_key=key.public_key(), now=now, lifetime=lifetime
    )
    (kit / "cert.pem").write_bytes(certificate)
    (kit / "key.pem").write_bytes(key_pem(key))
    return now + lifetime
