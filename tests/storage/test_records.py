import math
import subprocess
import sys
from collections.abc import Callable

import msgspec
import pytest

from hanse.errors import Conflict, ProtocolError, StaleEpoch
from hanse.ids import Ssid
from hanse.job import LEGAL, JobState
from hanse.messages import ITEM_BYTES, ModelRef, TaskFault
from hanse.storage.records import (
    AuditEntry,
    Lease,
    Standby,
    check_audit,
    check_commit,
    check_disabling,
    check_epoch,
    check_job,
    check_key,
    check_lease,
    check_model_ref,
    check_move,
    check_result,
    check_standby,
    check_successor,
    check_taking,
    check_tasks,
    check_tensor_form,
    check_tensor_ref,
    pack,
    session_id,
    unpack,
    unpack_task,
)

from .samples import DIGEST, answer, changed, commit, fault, key, model, record, task, tensor


def test_what_was_packed_reads_back_as_it_was() -> None:
    for value in (record(), task(), answer(), fault(), commit(3).state):
        assert unpack(pack(value), type(value)) == value


def test_a_field_of_the_wrong_type_is_named() -> None:
    with pytest.raises(ProtocolError) as caught:
        pack(changed(record(), package_bytes="three"))

    assert caught.value.field == "JobRecord.package_bytes"
    assert "Expected `int`" in caught.value.expected


@pytest.mark.parametrize("value", [object(), {1, 2, object()}, 2**70, "\ud800"])
def test_a_value_that_msgpack_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError, match="plain values"):
        check_commit(commit(0, values={"value": value}), now_s=1.0)


def test_values_that_contain_themselves_are_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(ProtocolError):
        check_commit(commit(0, values={"loop": loop}), now_s=1.0)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("job_id", "../etc"),
        ("job_id", ""),
        ("package", "abc"),
        ("package", ""),
        ("package_bytes", -1),
        ("result", "abc"),
        ("result_bytes", -1),
        ("state", "thinking"),
    ],
)
def test_a_job_that_cannot_be_is_refused_by_field(field: str, wrong: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_job(changed(record(), **{field: wrong}))

    assert caught.value.field == f"JobRecord.{field}"


def test_a_job_that_failed_without_a_reason_is_refused() -> None:
    with pytest.raises(ProtocolError, match="reason"):
        check_job(record(state=JobState.FAILED))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("name", ""),
        ("shape", (1,) * 33),
        ("shape", (2**40, 2**40)),
        ("shape", (0, 2**60)),
        ("digest", DIGEST.upper()),
        ("inline", b"123"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_by_field(field: str, wrong: object) -> None:
    with pytest.raises(ProtocolError, match=field):
        check_tensor_ref(changed(tensor(), **{field: wrong}), "the tensor's")


@pytest.mark.parametrize(
    ("field", "name", "dtype", "shape"),
    [("name", "", "float32", ()), ("dtype", "w", "complex64", ()), ("shape", "w", "float32", (-1, 3))],
)
def test_a_form_that_no_tensor_has_is_refused_by_field(
    field: str, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ProtocolError, match=f"the tensor's {field}"):
        check_tensor_form(name, dtype, shape, field="the tensor's")


def test_inline_bytes_above_the_limit_are_refused() -> None:
    large = tensor(shape=(20_000,), dtype="uint8", inline=bytes(20_000))

    with pytest.raises(ProtocolError, match="at most 16384"):
        check_tensor_ref(large, "the tensor's")


def test_every_dtype_and_shape_that_can_travel_is_accepted() -> None:
    for dtype, size in ITEM_BYTES.items():
        for shape in ((), (0,), (3, 0, 2), (2, 3)):
            inline = bytes(math.prod(shape) * size)
            check_tensor_ref(tensor(dtype=dtype, shape=shape, inline=inline), "the tensor's")


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ProtocolError, match="'w'"):
        check_model_ref(ModelRef((tensor("w"), tensor("w"))), "the model's")


@pytest.mark.parametrize(
    "wrong",
    [
        changed(answer(), fault=TaskFault("code", "and an update")),
        changed(answer(), update=None),
        changed(answer(), update=changed(answer().update, num_examples=-1)),
        changed(answer(), update=changed(answer().update, model=ModelRef((tensor(digest="x"),)))),
        changed(answer(), update=changed(answer().update, metrics={"loss": "low"})),
        changed(answer(), key=key("../x")),
        changed(answer(), key=changed(key(), round=-1)),
        changed(answer(), key=changed(key(), sequence=2**40)),
        changed(answer(), key=changed(key(), name="")),
    ],
)
def test_an_answer_that_cannot_be_is_refused(wrong: msgspec.Struct) -> None:
    with pytest.raises(ProtocolError):
        check_result(wrong)  # type: ignore[arg-type]  # that is the point


def test_a_commit_is_refused_for_a_bad_tensor_anywhere_in_its_state() -> None:
    bad = ModelRef((tensor(digest="no digest"),))
    for state in (changed(commit(1).state, model=bad), changed(commit(1).state, extra={"momentum": bad})):
        with pytest.raises(ProtocolError, match="no digest"):
            check_commit(changed(commit(1), state=state), now_s=1.0)


def test_a_commit_is_refused_for_a_bad_key_among_the_carried() -> None:
    with pytest.raises(ProtocolError, match=r"TaskKey\.client"):
        check_commit(changed(commit(1), carried=(key("../x"),)), now_s=1.0)


def test_tasks_that_share_a_model_share_it_when_packed() -> None:
    tasks = [task(f"site-{n}", of=model("a", "b")) for n in range(3)] + [task("site-3", of=model("c"))]

    packed, models = check_tasks(tasks)

    assert len(models) == 2
    assert [unpack_task(each.blob, models[each.model or b""]) for each in packed] == tasks


def test_a_task_without_a_model_is_packed_without_one() -> None:
    bare = changed(task(), model=None)

    packed, models = check_tasks([bare])

    assert models == {}
    assert packed[0].model is None
    assert unpack_task(packed[0].blob, None) == bare


def test_one_bad_task_refuses_them_all() -> None:
    with pytest.raises(ProtocolError):
        check_tasks([task("site-1"), task("site-2", of=ModelRef((tensor(""),)))])


@pytest.mark.parametrize("was", JobState)
@pytest.mark.parametrize("to", JobState)
@pytest.mark.parametrize("stored", JobState)
def test_a_job_moves_only_as_the_table_says_and_from_where_it_was_seen(
    stored: JobState, was: JobState, to: JobState
) -> None:
    legal = stored is was and (to is was or to in LEGAL[was])
    wanted = record(state=to, reason="it broke")

    if legal:
        check_move(stored, wanted, was=was)
    else:
        with pytest.raises(Conflict):
            check_move(stored, wanted, was=was)


def test_a_client_needs_a_name_that_is_one() -> None:
    check_disabling("site-1", "")
    with pytest.raises(ProtocolError, match=r"site\.1"):
        check_disabling("site.1", "")


@pytest.mark.parametrize("wrong", ["a\0b", "\ud800"])
def test_text_that_not_every_database_can_hold_is_refused_by_field(wrong: str) -> None:
    entry = AuditEntry(1.0, "admin@demo", "job abort", "job-1", "ok")
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("reason", lambda: check_disabling("site-1", wrong)),
        ("AuditEntry", lambda: check_audit(changed(entry, reason=wrong))),
        ("TaskKey.name", lambda: check_key(changed(key(), name=wrong))),
        ("Standby", lambda: check_standby(Standby("a:1", "a", wrong))),
        ("Lease", lambda: check_lease(Lease(1, "a:1", Ssid("s"), ttl_s=4.0, name="a", target=wrong))),
        ("Lease", lambda: check_lease(Lease(1, wrong, Ssid("s"), ttl_s=4.0, name="a", target=""))),
        ("successor", lambda: check_successor(wrong)),
    ]
    for field, check in refusals:
        with pytest.raises(ProtocolError) as caught:
            check()
        assert caught.value.field.startswith(field)


def test_a_successor_may_be_nobody_in_particular() -> None:
    check_successor("")
    check_successor("server-2")


LEASE = Lease(7, "a:1", Ssid("s-7"), beat=3, ttl_s=4.0, name="a")
FREE = Lease(8, "", Ssid("s-8"), ttl_s=4.0)


@pytest.mark.parametrize(
    ("lease", "server", "seen", "may"),
    [
        (FREE, "b", None, True),
        (FREE, "b", LEASE, True),
        (changed(FREE, successor="b"), "b", None, True),
        (changed(FREE, successor="c"), "b", None, False),
        (changed(FREE, successor="c"), "b", FREE, True),
        (LEASE, "a", None, True),
        (LEASE, "b", None, False),
        (LEASE, "b", LEASE, True),
        (LEASE, "b", changed(LEASE, target="elsewhere", ttl_s=9.0), True),
        (LEASE, "b", changed(LEASE, beat=2), False),
        (LEASE, "b", changed(LEASE, epoch=6), False),
        (LEASE, "b", changed(LEASE, holder="c:1"), False),
    ],
)
def test_a_lease_goes_to_whom_it_is_free_for_whose_it_is_or_who_saw_it_stand_still(
    lease: Lease, server: str, seen: Lease | None, may: bool
) -> None:
    if not may:
        with pytest.raises(Conflict):
            check_taking(lease, f"{server}:1", name=server, seen=seen, force=False)
    check_taking(lease, f"{server}:1", name=server, seen=seen, force=not may)


def test_only_the_leases_own_epoch_may_write() -> None:
    check_epoch(7, 7)
    for ours in (6, 8):
        with pytest.raises(StaleEpoch, match=f"epoch {ours} has ended"):
            check_epoch(ours, 7)


def test_sessions_of_different_tenures_and_stores_have_different_names() -> None:
    assert len({session_id(store, epoch) for store in ("a", "b") for epoch in (1, 2, 3)}) == 6


def test_only_the_sql_store_pays_for_sqlalchemy() -> None:
    modules = "hanse.storage.memory, hanse.storage.models, hanse.storage.packages"
    program = f"import sys, {modules}; print('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b"False\n"
