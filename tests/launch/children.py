"""What the launched test processes do; started as ``python -m children``."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from hanse.launch.process import read_spec
from hanse.launch.surviving import LifeLine


def say(text: str) -> None:
    """Log *text*, then say so to the test that waits at the other end of the named pipe, if there is one."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    if ready := os.environ.get("READY"):
        Path(ready).write_text(text)


def end(why: str) -> None:
    say(f"ending: {why}")
    os._exit(5)


def main() -> int:
    spec = read_spec(sys.stdin.buffer).decode()
    match spec.split():
        case ["exit", status]:
            return int(status)
        case ["print", *words]:
            say("\n".join(words))
            return 0
        case ["environment", name]:
            say(f"{os.environ.get(name)} {sys.path[0]}")
            return 0
        case ["set", *words]:
            say(" ".join(set(words)))
            return 0
        case ["group"]:
            say(f"{os.getpgid(0) == os.getpid()} {os.getsid(0) == os.getpid()}")
            return 0
        case ["print-much", size_bytes]:
            # One half is its own, the other comes from a process that it has started.
            half = f"{'x' * 99}\n" * (int(size_bytes) // 200)
            sys.stdout.write(f"first\n{half}")
            sys.stdout.flush()
            subprocess.run([sys.executable, "-c", "print(open(0).read())"], input=half, text=True, check=True)
            say("last")
            threading.Event().wait()
        case ["until-eof"]:
            say("reading")
            sys.stdin.buffer.read()
            sys.stdout.write("life line ended\n")
            return 0
        case ["stubborn"]:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            say("stubborn")
            threading.Event().wait()
        case ["polite"]:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
            say("polite")
            threading.Event().wait()
        case ["with-grandchild"]:
            # The grandchild inherits standard input and output, as a data loader's forked worker does.
            grandchild = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
            say(f"grandchild {grandchild.pid}")
            return 0
        case ["with-child"]:
            child = subprocess.Popen(["sleep", "1000"])
            say(f"child {child.pid}")
            threading.Event().wait()
        case ["survive", grace_s]:
            # Threads inherit it, so SIGTERM comes to the main one: where coverage is measured it has a handler, which
            # runs in that thread and would not wake it from its wait.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            LifeLine().watch(grace_s=float(grace_s), on_alone=end)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            say("surviving")
            threading.Event().wait()
        case ["fork-and-end"]:
            LifeLine()
            if os.fork():
                os._exit(6)
            say(f"forked {os.getpid()}")
            signal.pause()
        case ["fork-twice"]:
            number = int(os.environ["HANSE_PROCESS_LOCK"])
            LifeLine()
            if child := os.fork():
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(number)]
            if grandchild := os.fork():
                os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
            for descriptor in opened:
                os.fstat(descriptor)
            say("all that was opened is open")
            os._exit(0)
        case _:
            say(f"got {len(spec)} bytes")
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
