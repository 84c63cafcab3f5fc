"""The tree of errors: stable codes, who may retry, and sentences that a person can act on."""

import inspect
import re
from datetime import UTC, datetime

import pytest

from hanse import errors, model
from hanse.errors import HanseError

# What programs and people rely on: a code is never given another meaning. Code, exit status, retryable.
STABLE = {
    "HanseError": ("error", 1, False),
    "InternalError": ("internal", 70, False),
    "OperatorError": ("usage", 2, False),
    "ConfigError": ("config", 2, False),
    "JobInvalid": ("job-invalid", 2, False),
    "NotFound": ("not-found", 3, False),
    "Conflict": ("conflict", 4, False),
    "AccessError": ("access", 5, False),
    "Unauthenticated": ("unauthenticated", 5, False),
    "CertificateExpired": ("certificate-expired", 5, False),
    "Unauthorized": ("unauthorized", 5, False),
    "NotInService": ("not-in-service", 5, True),
    "SiteError": ("site", 10, False),
    "SiteRefused": ("site-refused", 10, False),
    "TrainingFailed": ("training-failed", 10, False),
    "ImportFailed": ("import-failed", 10, False),
    "MissingDependency": ("missing-dependency", 10, False),
    "ProcessDied": ("process-died", 10, True),
    "OutOfMemory": ("out-of-memory", 10, True),
    "UpdateRejected": ("update-rejected", 10, False),
    "WorkflowError": ("workflow", 11, False),
    "WorkflowFailed": ("workflow-failed", 11, False),
    "TooFewClients": ("too-few-clients", 11, False),
    "EnvironmentFault": ("environment", 12, True),
    "Unreachable": ("unreachable", 12, True),
    "TimedOut": ("timed-out", 12, True),
    "ProtocolError": ("protocol", 12, False),
    "VersionMismatch": ("version-mismatch", 12, False),
    "StoreFailed": ("store-failed", 12, True),
    "NoSpace": ("no-space", 12, True),
    "NotStarted": ("not-started", 12, True),
    "TensorDamaged": ("tensor-damaged", 12, True),
    "TensorsLost": ("tensors-lost", 12, False),
    "StaleEpoch": ("stale-epoch", 12, False),
}

SENTENCES = {
    errors.InternalError("sorting"): "Hanse failed while sorting; this is a bug, and the log has the traceback",
    errors.ConfigError("port", got=-1, expected="0 or more"): "port is -1; expected 0 or more",
    errors.ConfigError(
        "port", got=-1, expected="0 or more", where="a.toml"
    ): "port in a.toml is -1; expected 0 or more",
    errors.JobInvalid("min_clients", got=0, expected="1"): "the job's min_clients is 0; expected 1",
    errors.NotFound("job", "j1"): "there is no job 'j1'",
    errors.Conflict("job j1", state="running", wanted="started"): "job j1 is running, so it cannot be started",
    errors.Unauthenticated("no certificate"): "no certificate",
    errors.CertificateExpired("site-1", since=datetime(2025, 3, 4, 9, 30, tzinfo=UTC)): (
        "the certificate of 'site-1' expired on 2025-03-04 09:30 UTC; ask the project for a new one"
    ),
    errors.Unauthorized("ada", "stop it", needs="role admin"): "ada may not stop it; that needs role admin",
    errors.NotInService(): "Server not in service",
    errors.NotInService("restoring"): "restoring",
    errors.SiteRefused("site-1", "no code"): "site-1 refused the job: no code",
    errors.TrainingFailed("site-1", "train", "ValueError"): "task 'train' failed at site-1: ValueError",
    errors.ImportFailed("site-1", "SyntaxError: no (app.py:3)", python="3.11.9"): (
        "the job's code cannot be imported by Python 3.11.9 at site-1: SyntaxError: no (app.py:3)"
    ),
    errors.MissingDependency("site-1", "torch", place="app.py:3"): (
        "module 'torch', which app.py:3 imports, is not installed at site-1"
    ),
    errors.OutOfMemory("site-1", -9, "epoch 3"): (
        "the job's process at site-1 was killed because it had used up the memory that it may use; "
        "its log ends with: epoch 3"
    ),
    errors.ProcessDied("site-1", 3): "the job's process at site-1 ended with status 3",
    errors.ProcessDied("server", -9): "the job's process at server was killed by signal 9",
    errors.ProcessDied("site-1", errors.UNKNOWN_STATUS): (
        "the job's process at site-1 ended, and its agent, which had not started it, cannot tell how"
    ),
    errors.ProcessDied("server", 1, "oh"): "the job's process at server ended with status 1; its log ends with: oh",
    errors.UpdateRejected("site-3", "'w' as float16"): "site-3 sent 'w' as float16",
    errors.WorkflowFailed("fedavg", 2, "KeyError"): "workflow 'fedavg' failed in round 2: KeyError",
    errors.TooFewClients(got=1, needed=2, why="site-2 is lost"): (
        "only 1 of the 2 answers that the round needs can come: site-2 is lost"
    ),
    errors.Unreachable("host:1", "refused"): "cannot reach host:1: refused",
    errors.TimedOut("site-1", "train", 1.50): "site-1 did not answer 'train' within 1.5 s",
    errors.ProtocolError("topic", got="x", expected="y"): "topic is 'x'; expected y",
    errors.VersionMismatch("site-1", release="0.1.0", versions=[1], our_release="2.0.0", our_versions=(3, 2)): (
        "site-1 runs Hanse 0.1.0 (protocol 1), and this side runs Hanse 2.0.0 (protocol 2, 3); "
        "they need a protocol in common"
    ),
    errors.NoSpace("writing x", disk="/data", folder="/data/ws", why="No space left on device"): (
        "writing x failed: the disk mounted at /data, which holds /data/ws, is full (No space left on device)"
    ),
    errors.NotStarted("the run's process", "Too many open files", folder="/runs/j1"): (
        "the run's process could not be started: Too many open files; check the machine's memory, its limits on open "
        "files and processes, and the rights in /runs/j1"
    ),
    errors.TensorDamaged("ab12", folder="/data/tensors"): (
        "tensor ab12 in /data/tensors is missing or damaged: its file holds not what was written; check that disk"
    ),
    errors.StoreFailed("committing", "disk full"): "the store failed while committing: disk full",
    errors.TensorsLost("tumour-1", 7, "ab12"): (
        "tensor ab12 of round 7 of job tumour-1 is missing or damaged on the server's disk, so the run cannot go on; "
        "check the disk, and submit the job again"
    ),
    errors.StaleEpoch(ours=1, current=2): ("epoch 1 has ended (the store is at 2); this server may not write any more"),
}


def tree(root: type[HanseError]) -> list[type[HanseError]]:
    below = [each for child in root.__subclasses__() for each in tree(child)]
    return [root, *below]


def test_every_class_keeps_its_code_exit_status_and_whether_to_retry() -> None:
    found = {
        each.__name__: (each.code, each.exit_status, each.retryable)
        for each in tree(HanseError)
        if each.__module__ == errors.__name__
    }

    assert found == STABLE


def test_every_class_of_the_product_has_a_code_of_its_own() -> None:
    assert model.ModelInvalid in tree(HanseError)
    codes = [each.code for each in tree(HanseError) if each.__module__.startswith("hanse.")]

    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)
    assert all("code" in vars(each) for each in tree(HanseError) if each.__module__.startswith("hanse."))


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)", inspect.getdoc(errors) or "")

    assert ["HanseError", *drawn] == [each.__name__ for each in tree(HanseError) if each.__module__ == errors.__name__]


@pytest.mark.parametrize(("error", "sentence"), SENTENCES.items(), ids=lambda value: type(value).__name__)
def test_an_error_says_what_happened_in_one_sentence(error: HanseError, sentence: str) -> None:
    assert str(error) == error.reason == sentence


def test_every_class_that_is_raised_has_its_sentence_tested() -> None:
    drawn = {each for each in tree(HanseError) if each.__module__ == errors.__name__}
    leaves = drawn - {above for each in drawn for above in each.__mro__[1:]}
    raised_beside_their_children = {
        errors.Unauthenticated,
        errors.TrainingFailed,
        errors.ProcessDied,
        errors.StoreFailed,
    }

    assert {type(error) for error in SENTENCES} == leaves | raised_beside_their_children


def test_errors_carry_the_data_of_what_happened() -> None:
    config = errors.ConfigError("port", got=-1, expected="more", where="a.toml")
    died = errors.ProcessDied("site-1", -9, "bye")
    stale = errors.StaleEpoch(ours=1, current=2)

    assert (config.field, config.got, config.expected, config.where) == ("port", -1, "more", "a.toml")
    assert (died.where, died.status, died.last_line) == ("site-1", -9, "bye")
    assert (stale.ours, stale.current) == (1, 2)


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.JobInvalid, errors.ProtocolError])
def test_a_long_value_is_cut_in_the_sentence_and_kept_in_the_error(
    kind: type[errors.ConfigError | errors.JobInvalid | errors.ProtocolError],
) -> None:
    error = kind("field", got="x" * 5000, expected="less")

    assert len(str(error)) < 300
    assert "..." in str(error)
    assert error.got == "x" * 5000
