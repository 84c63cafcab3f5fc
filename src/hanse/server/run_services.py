"""What every run of a server uses of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hanse.cell.cell import Cell
from hanse.coordination.absence import Absence
from hanse.events import Handlers
from hanse.ids import ClientName, Fqcn, JobId
from hanse.launch.process import Launcher
from hanse.messages import JobCredentials
from hanse.settings import MEND_WITHIN_S
from hanse.storage.records import Store


@dataclass(frozen=True, slots=True)
class RunServices:
    """What a run uses of its server.

    ``epoch`` is that of the lease of ``store``, which ``store_id`` distinguishes from other stores. ``credentials``
    makes those of one job's cell; ``absent`` tells of clients that are not there why, as far as it is known. What the
    server cannot do for a run now, and may later, is given up after ``mend_within_s`` (seconds).
    """

    project: str
    epoch: int
    store: Store
    store_id: str
    cell: Cell
    launcher: Launcher
    credentials: Callable[[Fqcn, JobId], JobCredentials]
    handlers: Handlers
    now: Callable[[], float]
    wall: Callable[[], float]
    run_url: str
    check_frequency_s: float = 3.0
    mend_within_s: float = MEND_WITHIN_S
    absent: Callable[[], Mapping[ClientName, Absence]] = dict
