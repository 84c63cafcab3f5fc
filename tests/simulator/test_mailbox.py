"""Mail arrives in order, and a signal gets through however it is timed."""

import signal
import threading
from types import FrameType

import pytest

from hanse.simulator.mailbox import Mailbox


def test_items_arrive_in_order_from_another_thread() -> None:
    with Mailbox[int]() as mailbox:
        thread = threading.Thread(target=lambda: [mailbox.put(number) for number in range(5000)])
        thread.start()
        assert [mailbox.take() for _ in range(5000)] == list(range(5000))
        thread.join()


def test_many_items_that_nobody_takes_block_nobody() -> None:
    with Mailbox[int]() as mailbox:
        for number in range(100_000):
            mailbox.put(number)
        assert mailbox.take() == 0


def test_signal_wakes_the_taker_and_what_was_set_before_is_set_again() -> None:
    class Interrupted(Exception):
        pass

    def handler(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGUSR1, handler)
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    try:
        with Mailbox[int]() as mailbox:
            timer = threading.Timer(0.01, signal.raise_signal, [signal.SIGUSR1])
            timer.start()
            with pytest.raises(Interrupted):
                mailbox.take()
            timer.join()
        assert signal.set_wakeup_fd(descriptor) == descriptor
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_may_take_too() -> None:
    taken: list[int] = []

    def take() -> None:
        with mailbox:
            taken.append(mailbox.take())

    mailbox = Mailbox[int]()
    thread = threading.Thread(target=take)
    thread.start()
    mailbox.put(1)
    thread.join()
    assert taken == [1]
