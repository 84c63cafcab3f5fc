"""What a run's process is told on its standard input when it starts: no secret is ever on a command line."""

import msgspec

from hanse.ids import JobId
from hanse.job import JobSpec
from hanse.messages import Credentials


class RunProcessSpec(msgspec.Struct, frozen=True):
    """All that a run's process needs: its job, its folder, whose tenure it is of, its server and its proof."""

    job_id: JobId
    project: str
    spec: JobSpec
    folder: str
    epoch: int
    parent_url: str
    credentials: Credentials
    check_frequency_s: float = 3.0
