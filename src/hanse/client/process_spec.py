"""What a job's process at a site is told when it starts: written to its standard input, never on a command line."""

from typing import Final

import msgspec

from hanse.ids import ClientName, JobId
from hanse.job import Config, JobSpec
from hanse.messages import JobCredentials
from hanse.settings import SitePolicy

PROCESS_MODULE: Final = "hanse.client.job_process"
TAIL_CHARS: Final = 8 * 1024
"""The most that leaves the site of the log's last lines, however many the site lets go."""

AGENT_GRACE_S: Final = 120.0
"""How long a job's process goes on without an agent. Long enough for whatever supervises an agent that crashed to start
it again, and for a person who watches it; short enough that a site whose agent was killed for good is at rest soon."""


class JobProcessSpec(msgspec.Struct, frozen=True):
    """All that a job's process needs: the job, its folders, where the server listens, and what proves it there.

    ``code`` is the folder of the job's own code; empty where the site lets none run, so that nothing of it can be
    imported in place of what is installed. ``roots`` is what TLS is checked against, in PEM; empty without TLS. ``log``
    is the file that the process's output goes to; empty where it goes to none. The process ends by itself when it has
    had no agent for ``agent_grace_s``.
    """

    job_id: JobId
    client: ClientName
    project: str
    spec: JobSpec
    identity: JobCredentials
    servers: tuple[str, ...]
    roots: bytes
    code: str
    tensors: str
    log: str = ""
    site: Config = {}
    policy: SitePolicy = SitePolicy()
    agent_grace_s: float = AGENT_GRACE_S
