"""Handing tasks to the job's own code, in the thread that such code expects: the main one.

The job's cell lives on the event loop's thread; frameworks, signal handlers and users' scripts want the main thread. A
``MainThreadTrainer`` joins the two: ``run`` puts a task into its inbox and awaits the answer, and the main thread,
inside ``serve_app`` or ``serve_script``, takes tasks out one by one. Whatever the code raises becomes
``TrainingFailed`` with the exception, its message and the user's own line, or one of its children where the reason is
a known one (a module that is not installed); the process goes on to the next task.
"""

import asyncio
import contextlib
import importlib
import logging
import operator
import platform
import queue
import runpy
import traceback
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol

from hanse.client.api import OutOfTurn, ReceivedTask, Site, session_of
from hanse.client.app import ClientApp
from hanse.client.task import TaskContext
from hanse.errors import HanseError, ImportFailed, JobInvalid, MissingDependency, TrainingFailed
from hanse.model import Model, Update
from hanse.storage.packages import comes_with

_log = logging.getLogger(__name__)

ENDING: Final = "the process is ending"
"""Why a task has no answer when nobody serves any more."""
START: Final = "start"
"""What the code was doing, in place of a task's name, when it fails before its first task."""


class Trainer(Protocol):
    """Works on tasks, one at a time."""

    async def run(self, model: Model, ctx: TaskContext) -> Update:
        """Return the code's answer to the task.

        When this call is cancelled the answer is dropped; code that runs already runs to its end.

        Raises:
            TrainingFailed: the code raised, or returned something else than an ``Update``.
        """
        ...


def load_app(reference: str, *, client: str, code: Path) -> ClientApp:
    """Import and return the app that *reference* (``module:attribute``) names; *code* is the job's folder.

    Raises:
        JobInvalid: there is no such module or attribute, or it is no ``ClientApp``.
        MissingDependency: something that the module imports is not installed.
        ImportFailed: the module raised while it was imported.
    """
    module_name, _, attribute = reference.partition(":")
    try:
        app = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:  # the module is the user's: whatever it raises is told by the sentence
        if _is_about(error, module_name, attribute):
            raise JobInvalid("client", got=reference, expected=f"an app that can be imported ({error})") from error
        raise import_failure(error, client=client, code=code) from error
    if not isinstance(app, ClientApp):
        raise JobInvalid("client", got=reference, expected=f"a ClientApp; it is a {type(app).__name__}")
    return app


def run_function(app: ClientApp, model: Model, ctx: TaskContext, *, code: Path) -> Update:
    """Return what *app*'s function for the task returns, called in this thread.

    Raises:
        TrainingFailed: the app has no function for the task, or it raised, or returned no ``Update``.
    """
    try:
        answer: object = app.handler(ctx.name)(model, ctx)
    except (Exception, SystemExit) as error:
        raise failure_of(error, client=ctx.client, task=ctx.name, code=code) from error
    if not isinstance(answer, Update):
        why = f"the function for {ctx.name!r} returned {type(answer).__name__}; expected a hanse Update"
        raise TrainingFailed(ctx.client, ctx.name, why)
    return answer


def plain_update(update: Update, *, client: str, task: str) -> Update:
    """Return *update* with plain numbers in place of NumPy's, which do not travel.

    Raises:
        TrainingFailed: ``num_examples`` is no whole number, or a metric no number.
    """
    try:
        metrics = {str(name): float(value) for name, value in update.metrics.items()}
        return Update(update.model, operator.index(update.num_examples), metrics)
    except (TypeError, ValueError) as error:
        why = f"an update needs a whole number for num_examples and numbers for metrics ({error})"
        raise TrainingFailed(client, task, why) from error


def failure_of(error: BaseException, *, client: str, task: str, code: Path) -> TrainingFailed:
    """Return the failure that says that the job's code, whose folder is *code*, raised *error* in *task*."""
    return _missing(error, client=client, code=code) or TrainingFailed(client, task, described(error, code))


def import_failure(error: BaseException, *, client: str, code: Path) -> TrainingFailed:
    """Return the failure that says that the job's code, whose folder is *code*, raised *error* while imported."""
    python = platform.python_version()
    return _missing(error, client=client, code=code) or ImportFailed(client, described(error, code), python=python)


def _missing(error: BaseException, *, client: str, code: Path) -> MissingDependency | None:
    """Return the failure of a module that is not installed; ``None`` where *error* is not about one.

    A module whose name begins like a module of the job's is not one: the job's code imports what it has not.
    """
    if not isinstance(error, ModuleNotFoundError) or not error.name or comes_with(code, error.name):
        return None
    return MissingDependency(client, error.name, place=_place(error, code) or "the job's code")


def _is_about(error: BaseException, module: str, attribute: str) -> bool:
    """Return whether *error* says that there is no *module* by that name, or no *attribute* in it."""
    if isinstance(error, ModuleNotFoundError):
        return error.name is not None and f"{module}.".startswith(f"{error.name}.")
    return isinstance(error, AttributeError) and error.name == attribute and isinstance(error.obj, ModuleType)


def described(error: BaseException, code: Path) -> str:
    """Return *error* as ``Type: message (file:line)``: the innermost line of the job's own code, else of any."""
    text, said = type(error).__name__, _said(error)
    text = f"{text}: {said}" if said else text
    if isinstance(error, HanseError) and not _own_frames(error, code):
        return str(error)  # our own sentence, complete without a line of ours
    place = _place(error, code)
    return f"{text} ({place})" if place else text


def _said(error: BaseException) -> str:
    """Return what *error* says; nothing where not even that goes well."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - the error's class is the user's
        return ""


def _place(error: BaseException, code: Path) -> str:
    """Return ``file:line`` where *error* was raised, in the job's own code if it came through that; empty: unknown."""
    own, frames = _own_frames(error, code), traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    frame = (own or list(frames))[-1]
    file = Path(frame.filename).relative_to(code.resolve()) if own else Path(frame.filename).name
    return f"{file}:{frame.lineno}"


def _own_frames(error: BaseException, code: Path) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if Path(frame.filename).is_relative_to(code.resolve())]


@dataclass(slots=True, eq=False)
class _Work:
    """A task on its way to the main thread, and the place for its answer."""

    model: Model
    ctx: TaskContext
    answer: Future[Update]


class _Inbox:
    """Tasks for the serving thread, in order; ``take`` returns ``None`` from the moment it is closed.

    Once nobody serves any more (``end``), what waits and what still comes is failed, so that nobody awaits it for ever.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._has_ended = False

    def put(self, work: _Work) -> None:
        self._queue.put(work)
        if self._has_ended:  # looked at after the put: either this call or ``end`` sees the other's work
            self._fail_all()

    def close(self) -> None:
        self._queue.put(None)

    def take(self) -> _Work | None:
        """Wait for a task that is still wanted; from then on it cannot be withdrawn."""
        if self._has_ended:
            return None
        while (work := self._queue.get()) is not None:
            if work.answer.set_running_or_notify_cancel():
                return work
        self.close()  # closed stays closed
        return None

    def end(self) -> None:
        self._has_ended = True
        self._fail_all()

    def _fail_all(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                work = self._queue.get_nowait()
                if work is not None and work.answer.set_running_or_notify_cancel():
                    work.answer.set_exception(TrainingFailed(work.ctx.client, work.ctx.name, ENDING))


class MainThreadTrainer:
    """Runs a job's code, an app's functions or a script, in the thread that calls ``serve_…``; see the module.

    *code* is the folder of the job's files. ``close`` makes ``serve_…`` return after the task in hand.
    """

    def __init__(self, code: Path) -> None:
        self._code = code
        self._inbox = _Inbox()

    async def run(self, model: Model, ctx: TaskContext) -> Update:
        """Hand the task to the serving thread and return its answer (see ``Trainer.run``)."""
        return await asyncio.wrap_future(self.submit(model, ctx))

    def submit(self, model: Model, ctx: TaskContext) -> Future[Update]:
        """Hand the task to the serving thread, from any other; the answer is what ``run`` returns or raises."""
        work = _Work(model, ctx, Future())
        self._inbox.put(work)
        return work.answer

    def close(self) -> None:
        """Have ``serve_…`` return when it is done with the task in hand; to be called from any thread."""
        self._inbox.close()

    def serve_app(self, app: ClientApp) -> None:
        """Work on tasks with *app*'s functions until closed."""
        try:
            while (work := self._inbox.take()) is not None:
                try:
                    work.answer.set_result(run_function(app, work.model, work.ctx, code=self._code))
                except TrainingFailed as failure:
                    _log.error("training code failed", exc_info=failure.__cause__ or failure)
                    work.answer.set_exception(failure)
        finally:
            self._inbox.end()

    def serve_script(self, script: Path, site: Site) -> None:
        """Run *script* as a program until closed: at once, and again when a task comes after it has ended.

        A script that raises gives its task a fault, and is run again for the next.

        Raises:
            TrainingFailed: it failed or ended before it ever had a task, so that there is none to give the fault to.
        """
        session = _ScriptSession(self._inbox, site)
        try:
            while session.taken == 0 or session.wait_task():
                taken_before = session.taken
                failure = self._run_script(script, session)
                if session.is_over:
                    return
                if failure is None and session.task is not None:
                    failure = session.failure(f"the script {script.name} ended without sending its answer")
                elif failure is None and session.taken == taken_before:
                    failure = session.failure(f"the script {script.name} ended without receiving its task")
                if failure is not None and not session.fail(failure) and session.taken == 0:
                    raise failure
        finally:
            session.fail(session.failure(ENDING))
            self._inbox.end()

    def _run_script(self, script: Path, session: "_ScriptSession") -> TrainingFailed | None:
        """Run *script* once; return why it failed, ``None`` when it did not."""
        try:
            with session_of(session):
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit as error:
            return None if error.code in (None, 0) else session.failure(described(error, self._code))
        except Exception as error:  # noqa: BLE001 - the script is the user's; its failure goes on as the task's fault
            if not session.is_over:
                _log.exception("training script failed")
            client, task = session.site.name, session.task_name
            if task == START and isinstance(error, ImportError | SyntaxError):
                return import_failure(error, client=client, code=self._code)
            return failure_of(error, client=client, task=task, code=self._code)
        return None


class _ScriptSession:
    """What ``hanse.client``'s functions talk to while a script runs: at most one task in hand, one taken in advance."""

    def __init__(self, inbox: _Inbox, site: Site) -> None:
        self.site = site
        self.next: _Work | None = None
        self.is_over = False
        self.taken = 0
        self._inbox = inbox
        self._in_hand: _Work | None = None

    @property
    def task(self) -> ReceivedTask | None:
        work = self._in_hand
        return None if work is None else ReceivedTask(work.model, work.ctx)

    def wait_task(self) -> bool:
        if self._in_hand is not None:
            raise OutOfTurn(f"the script asked for a task before it sent its answer to {self._in_hand.ctx.name!r}")
        if self.next is None and not self.is_over:
            self.next = self._inbox.take()
            self.is_over = self.next is None
        return self.next is not None

    def receive(self) -> ReceivedTask:
        if not self.wait_task() or self.next is None:
            raise OutOfTurn("the run has ended, so there is no task to receive; ask hanse.client.is_running first")
        self._in_hand, self.next = self.next, None
        self.taken += 1
        return ReceivedTask(self._in_hand.model, self._in_hand.ctx)

    def send(self, update: Update) -> None:
        if self._in_hand is None:
            raise OutOfTurn("there is no task to answer; call hanse.client.receive first")
        work, self._in_hand = self._in_hand, None
        work.answer.set_result(update)

    @property
    def task_name(self) -> str:
        """What the script does: the task in hand, else the one taken in advance."""
        work = self._in_hand or self.next
        return START if work is None else work.ctx.name

    def failure(self, why: str) -> TrainingFailed:
        return TrainingFailed(self.site.name, self.task_name, why)

    def fail(self, failure: TrainingFailed) -> bool:
        """Give the task in hand, else the one taken in advance, a fault; return whether there was one."""
        work = self._in_hand or self.next
        if work is None:
            return False
        if work is self.next:
            self.next = None
            self.taken += 1
        self._in_hand = None
        work.answer.set_exception(failure)
        return True
