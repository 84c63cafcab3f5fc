"""A worker of the simulator: ``python -m hanse.simulator.worker``, started by a pool, running users' training code.

A worker for functions serves whichever client it is asked for: it imports a job's code once, from the job's folder, and
forgets it when it is asked for another job's. So what a function keeps in its module between two tasks is no client's
own here. A worker for a script is one client's, and runs the script as a deployed job's process does, in the main
thread, from task to task.

What the code prints goes to the worker's log; standard input is empty; the way to the pool is a socket of its own. The
worker ends when the pool closes that, and at once when the pool is gone, whatever the code is doing.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from socket import socket
from typing import BinaryIO

import msgspec

from hanse.client.app import ClientApp
from hanse.client.task import TaskContext
from hanse.client.trainer import ENDING, MainThreadTrainer, load_app, plain_update, run_function
from hanse.errors import HanseError, ImportFailed, InternalError, JobInvalid, MissingDependency, TrainingFailed
from hanse.launch.log_lines import log_to_stderr
from hanse.launch.process import end_with_group, read_spec
from hanse.messages import Metrics, UpdateRef
from hanse.model import Model, Update
from hanse.run.loading import importing_from
from hanse.simulator.exchange import (
    Answer,
    Broken,
    Channel,
    Done,
    Failure,
    Faulty,
    Invalid,
    Load,
    Loaded,
    Logged,
    Missing,
    Raised,
    Unimportable,
    Work,
    WorkerSpec,
)
from hanse.storage.models import load_model, store_model
from hanse.storage.tensors import TensorFiles

_log = logging.getLogger(__name__)

ORPHANED = 3
"""The exit status of a worker whose pool is gone."""


def main() -> int:
    """Serve the pool that standard input tells of, until it closes the channel; return the exit status."""
    log_to_stderr()
    life_line = _take_life_line()
    spec = msgspec.msgpack.decode(read_spec(life_line), type=WorkerSpec)
    threading.Thread(target=_end_with_pool, args=(life_line,), name="life line", daemon=True).start()
    channel = Channel(socket(fileno=spec.channel))
    if spec.site is None:
        serve_functions(channel)
    else:
        serve_script(channel, spec.site.name, spec)
    return 0


def serve_functions(channel: Channel) -> None:
    """Answer requests one by one until the channel ends."""
    with JobCode() as code:
        while (request := channel.read()) is not None:
            channel.write(_answer(request, code, channel))


def serve_script(channel: Channel, client: str, spec: WorkerSpec) -> None:
    """Run the script in this thread, and let it work on the channel's tasks, until the channel ends."""
    code = Path(spec.code)
    script = code / spec.script
    os.chdir(code)
    sys.path.insert(0, spec.code)
    sys.argv = [str(script)]
    trainer = MainThreadTrainer(code)
    threading.Thread(target=_feed, args=(channel, trainer), name="tasks", daemon=True).start()
    if spec.site is None:
        raise InternalError(f"starting the script of {client}")
    try:
        trainer.serve_script(script, spec.site)
    except TrainingFailed as failure:
        channel.write(Broken(_told(0, failure)))


class JobCode:
    """The one job's code that is imported at a time; another one's is imported in its place."""

    def __init__(self) -> None:
        self._of: tuple[str, str] | None = None
        self._app: ClientApp | None = None
        self._importing = ExitStack()

    def __enter__(self) -> "JobCode":
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()

    def app(self, code: str, reference: str, *, client: str) -> ClientApp:
        """Return the app *reference* of the folder *code*, which is the working directory from now on.

        Raises:
            JobInvalid, TrainingFailed: as ``load_app``.
        """
        if self._app is not None and self._of == (code, reference):
            return self._app
        self._forget()
        os.chdir(code)
        self._importing.enter_context(importing_from(Path(code)))
        try:
            self._app = load_app(reference, client=client, code=Path(code))
        except BaseException:
            self._forget()
            raise
        self._of = (code, reference)
        return self._app

    def _forget(self) -> None:
        self._of = self._app = None
        self._importing.close()


def _answer(request: Load | Work, code: JobCode, channel: Channel) -> Answer:
    """Do what *request* asks; whatever goes wrong is the answer."""

    def answer() -> Answer:
        app = code.app(request.code, request.reference, client=request.client)
        if isinstance(request, Load):
            return Loaded(request.number)
        _log.info("task", extra={"client": request.client, "task": request.name, "round": request.round})
        files = TensorFiles(Path(request.tensors))
        model, ctx = load_model(request.model, files), _context(request, channel)
        return _done(request.number, run_function(app, model, ctx, code=Path(request.code)), ctx, files)

    return _guarded(request.number, answer)


def _feed(channel: Channel, trainer: MainThreadTrainer) -> None:
    """Hand the channel's tasks to the script, and see that each is answered; close *trainer* when the channel ends."""
    with suppress(OSError):
        while (request := channel.read()) is not None:
            if isinstance(request, Work):
                _give(request, channel, trainer)
    trainer.close()


def _give(request: Work, channel: Channel, trainer: MainThreadTrainer) -> None:
    files, ctx = TensorFiles(Path(request.tensors)), _context(request, channel)

    def answered(future: "Future[Update]") -> None:
        failure = future.exception()
        if isinstance(failure, TrainingFailed) and failure.why == ENDING:
            return  # the script has ended for good; that is said by itself, or nobody wants to know
        with suppress(OSError):
            channel.write(_guarded(request.number, lambda: _done(request.number, future.result(), ctx, files)))

    model: Model | None = None

    def load() -> Answer:
        nonlocal model
        model = load_model(request.model, files)
        return Loaded(request.number)

    loaded = _guarded(request.number, load)
    if model is None:
        channel.write(loaded)
    else:
        trainer.submit(model, ctx).add_done_callback(answered)


def _done(number: int, update: Update, ctx: TaskContext, files: TensorFiles) -> Done:
    plain = plain_update(update, client=ctx.client, task=ctx.name)
    model = None if plain.model is None else store_model(plain.model, files)
    return Done(number, UpdateRef(model, plain.num_examples, plain.metrics))


def _guarded(number: int, answer: Callable[[], Answer]) -> Answer:
    try:
        return answer()
    except TrainingFailed as failure:
        _log.error("training code failed", exc_info=failure.__cause__ or failure)
        return _told(number, failure)
    except JobInvalid as error:
        _log.error("no app to work with", exc_info=error.__cause__ or error)
        return Invalid(number, error.expected)
    except HanseError as error:
        _log.error("task failed", exc_info=error)
        return Faulty(number, error.reason)
    except Exception:  # noqa: BLE001 - a bug of ours costs this task its answer, and no other
        _log.exception("task failed")
        return Faulty(number, InternalError("working on a task of the simulation").reason)


def _told(number: int, failure: TrainingFailed) -> Failure:
    match failure:
        case MissingDependency():
            return Missing(number, failure.module, failure.place)
        case ImportFailed():
            return Unimportable(number, failure.error, failure.python)
        case _:
            return Raised(number, failure.why)


def _context(work: Work, channel: Channel) -> TaskContext:
    def log(step: int, metrics: Metrics) -> None:
        with suppress(OSError):  # the pool is going, and so is this process
            channel.write(Logged(work.number, step, metrics))

    return TaskContext(
        client=work.client,
        job=work.job,
        round=work.round,
        name=work.name,
        config=work.config,
        site=work.site,
        seed=work.seed,
        log_metrics=log,
    )


def _take_life_line() -> BinaryIO:
    """Return the pipe to the pool, moved away from standard input, which the job's code may read and finds empty."""
    life_line = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return life_line


def _end_with_pool(life_line: BinaryIO) -> None:
    while life_line.read(1024):
        continue
    end_with_group(ORPHANED)


if __name__ == "__main__":
    sys.exit(main())
