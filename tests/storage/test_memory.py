from hanse.storage.memory import MemoryStore

from .samples import take


async def test_sessions_of_stores_with_different_ids_differ() -> None:
    sessions = set()
    for store_id in ("a", "b"):
        async with MemoryStore(store_id=store_id) as store:
            sessions.add((await take(store, "server-1")).ssid)

    assert len(sessions) == 2


async def test_the_same_calls_give_the_same_session() -> None:
    sessions = set()
    for _ in range(2):
        async with MemoryStore() as store:
            sessions.add((await take(store, "server-1")).ssid)

    assert len(sessions) == 1
