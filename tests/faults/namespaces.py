"""Machines of their own for participants: network namespaces, each with a line to this one (Debian's ``iproute2``).

What a line can do that a proxy cannot: packets vanish and nobody is told, addresses change, routes go.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from tests.faults.requirements import missing


class Machine:
    """A namespace *name*, whose line to this machine is *line* there and *plug* here; *subnet* is ``10.1.2``."""

    def __init__(self, name: str, *, plug: str, line: str, subnet: str) -> None:
        self.name, self._plug, self._line, self._subnet = name, plug, line, subnet

    @property
    def prefix(self) -> list[str]:
        """The words before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]

    def cut(self) -> None:
        """Have what is sent either way vanish."""
        _ip("link", "set", self._plug, "down")

    def mend(self) -> None:
        """Have the line carry again what is sent."""
        _ip("link", "set", self._plug, "up")

    def lose_the_way(self, to: str) -> None:
        """Have no way to the address *to*, and know it."""
        self._here("route", "add", "unreachable", f"{to}/32")

    def find_the_way(self, to: str) -> None:
        """Have the way to the address *to* again."""
        self._here("route", "del", "unreachable", f"{to}/32")

    def move(self, host: int) -> None:
        """Have another address: whoever had a connection with the old one hears no more of it."""
        self._here("addr", "flush", "dev", self._line)
        self._live_at(host)

    def spoil(self, *how: str) -> None:
        """Have the line do to packets what the queueing discipline netem does for *how*; skip where there is none."""
        command = ["tc", "qdisc", "add", "dev", self._plug, "root", "netem", *how]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            missing("netem", f"tc says: {done.stderr.strip()}")

    def _set_up(self, host: int) -> None:
        _ip("link", "add", self._plug, "type", "veth", "peer", "name", self._line, "netns", self.name)
        _ip("addr", "add", f"{self._subnet}.1/24", "dev", self._plug)
        self.mend()
        self._here("link", "set", "lo", "up")
        self._here("link", "set", self._line, "up")
        self._live_at(host)

    def _live_at(self, host: int) -> None:
        self._here("addr", "add", f"{self._subnet}.{host}/24", "dev", self._line)
        self._here("route", "add", "default", "via", f"{self._subnet}.1")

    def _here(self, *words: str) -> None:
        _ip("-n", self.name, *words)


@contextmanager
def machines(names: Sequence[str]) -> Iterator[tuple[str, dict[str, Machine]]]:
    """Give an address of this machine, and one machine for each of *names* that reaches it; skip where none can be."""
    own = os.getpid()
    network = f"10.{100 + own % 100}"
    address = f"{network}.255.1"
    if shutil.which("ip") is None:
        missing("netns", "there is no 'ip'")
    with ExitStack() as stack:
        made = {}
        for number, name in enumerate(names, start=1):
            machine = Machine(
                f"hanse-{own}-{name}", plug=f"hp{own}-{number}", line=f"hl{own}-{number}", subnet=f"{network}.{number}"
            )
            try:
                _ip("netns", "add", machine.name)
            except OSError as error:
                missing("netns", str(error))
            stack.callback(_ip, "netns", "del", machine.name)  # its line goes with it
            machine._set_up(2)
            made[name] = machine
        _ip("addr", "add", f"{address}/32", "dev", "lo")
        stack.callback(_ip, "addr", "del", f"{address}/32", "dev", "lo")
        yield address, made


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
