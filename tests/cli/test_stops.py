"""How the main thread of a process hears that it is asked to stop."""

import os
import signal
import subprocess
import sys
import threading

from hanse.cli.stops import Stops

GIVEN_TO_ANOTHER_THREAD = """
import os, signal, threading
from hanse.cli.stops import Stops

other = threading.Event()
thread = threading.Thread(target=other.wait)
with Stops() as stops, stops.hearing_signals():
    thread.start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("ready", flush=True)
    print(stops.get(), flush=True)
other.set()
"""


def test_a_signal_that_another_thread_receives_wakes_the_main_thread() -> None:
    command = [sys.executable, "-c", GIVEN_TO_ANOTHER_THREAD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        said, _ = process.communicate(timeout=30)

    assert said == "SIGTERM\n"


def test_signals_ask_by_their_names_until_the_block_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stops() as stops, stops.hearing_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.get() == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.get() == "SIGINT"

    assert signal.getsignal(signal.SIGTERM) is before


def test_whoever_asks_is_heard_in_turn_and_never_blocked() -> None:
    with Stops() as stops:
        thread = threading.Thread(target=lambda: [stops.put(str(number)) for number in range(100_000)])
        thread.start()
        thread.join()

        assert [stops.get() for _ in range(100_000)] == [str(number) for number in range(100_000)]
