"""What a run's process is told on its standard input when it starts: no secret is ever on a command line."""

from typing import Final

import msgspec

from hanse.ids import JobId
from hanse.job import JobSpec
from hanse.messages import Credentials

WITHHELD: Final = frozenset(
    {
        "AWS_ACCESS_KEY_ID",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_SSE_CUSTOMER_KEY_BASE64",
        "AWS_TOKEN",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "PGPASSFILE",
        "PGPASSWORD",
    }
)
"""What of the server's environment is not in that of its runs' processes: the keys to its bucket and its database."""


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
