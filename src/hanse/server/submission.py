"""How a job comes in: its package is unpacked and checked, kept where every server finds it, and stored as a job."""

import asyncio
import importlib
import logging
import re
import secrets
import shutil
from pathlib import Path
from types import ModuleType
from typing import Final

from hanse.errors import HanseError, JobInvalid, StoreFailed
from hanse.events import EventType, FLContext
from hanse.ids import JobId
from hanse.job import JobRecord
from hanse.learning.workflow import WORKFLOWS, load_workflow
from hanse.server.run_folder import RunFolder, RunFolders
from hanse.server.run_services import RunServices
from hanse.storage.disk import on_disk
from hanse.storage.packages import unpack_package
from hanse.storage.records import is_stored
from hanse.storage.tensors import TensorFiles

MAX_SLUG_CHARS: Final = 54
"""What of a job's name is in its id, which has 63 characters at most, eight of them random."""
_NOT_IN_ID = re.compile(r"[^a-z0-9]+")

_log = logging.getLogger(__name__)


async def submit(package: Path, *, submitter: str, services: RunServices, folders: RunFolders) -> JobRecord:
    """Store the job whose package is the file *package*, and return its record; one that is refused leaves nothing.

    Raises:
        JobInvalid: the package or its definition does not hold, or a handler refuses it.
        StoreFailed: it is not stored, or that cannot be told now; then its files stay, for the next tenure to decide.
    """
    job_folder, record = await asyncio.to_thread(_received, package, submitter, services, folders)
    context = FLContext("server", project=services.project, peer=submitter, job_id=record.job_id)
    try:
        if (refused := services.handlers.ask(EventType.JOB_SUBMITTED, context)) is not None:
            raise JobInvalid("submission", got=record.spec.name, expected=f"one that the server takes: {refused}")
        await job_folder.keep_package(record.package)
        await services.store.add_job(services.epoch, record)
    except HanseError as error:
        # While the store cannot be asked, the files stay: it may have the job.
        if not (isinstance(error, StoreFailed) and await is_stored(services.store, record)):
            await _discard(job_folder, record)
            raise
    await asyncio.to_thread(job_folder.forget_untold)
    _log.info("job submitted", extra={"job": record.job_id, "submitter": submitter, "folder": str(job_folder.path)})
    return record


def _received(package: Path, submitter: str, services: RunServices, folders: RunFolders) -> tuple[RunFolder, JobRecord]:
    incoming = folders.new_incoming()
    try:
        with on_disk("receiving a job", incoming.path):
            data = package.read_bytes()
            spec = unpack_package(data, incoming.code)
            if spec.workflow.name in WORKFLOWS:
                load_workflow(spec.workflow, _no_import)
            digest = TensorFiles(incoming.package).put(memoryview(data))
            incoming.note_untold(services.store_id)
            slug = _NOT_IN_ID.sub("-", spec.name.lower())[:MAX_SLUG_CHARS].strip("-") or "job"
            job_id = JobId(f"{slug}-{secrets.token_hex(4)}")
            folder = folders.of(job_id)
            incoming.path.rename(folder.path)
    except HanseError:
        shutil.rmtree(incoming.path, ignore_errors=True)
        raise
    record = JobRecord(
        job_id=job_id,
        spec=spec,
        submitter=submitter,
        submitted_at=services.wall(),
        package=digest,
        package_bytes=len(data),
    )
    return folder, record


async def _discard(folder: RunFolder, record: JobRecord) -> None:
    try:
        await folder.discard(record)
    except StoreFailed as failed:
        _log.warning("a refused job is left behind", extra={"job": record.job_id, "reason": failed.reason})


def _no_import(name: str) -> ModuleType:
    if name.startswith("hanse.learning."):
        return importlib.import_module(name)
    raise ImportError("a job's code is not imported by the server")
