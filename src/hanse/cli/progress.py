"""How a job fares, on standard error while it runs: a display that is drawn anew on a terminal, else a line a fact."""

import sys
from collections import deque
from types import TracebackType
from typing import Final, Self

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hanse.cli.job_text import waiting_text
from hanse.cli.output import console_on, metrics_text
from hanse.cli.terminal import printable
from hanse.events import EventType
from hanse.job import ENDED
from hanse.messages import JobEvent, JobView

SHOWN_ROUNDS: Final = 8
SHOWN_CLIENTS: Final = 20
_REMARKABLE: Final = {"client_lost", "client_back", "client_failed", "client_refused"}
_DOING: Final = {EventType.TASK_SENT.value: "works", EventType.RESULT_ACCEPTED.value: "answered"}


class JobProgress:
    """Shows a job from what ``AdminSession.follow`` yields; *is_quiet* shows nothing."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._view: JobView | None = None
        self._state = ""
        self._round = 0
        self._clients: dict[str, str] = {}
        self._rounds: deque[tuple[int, dict[str, float]]] = deque(maxlen=SHOWN_ROUNDS)
        self._remarks: deque[str] = deque(maxlen=3)
        self._waiting = ""
        self._is_quiet = is_quiet
        is_terminal = sys.stderr.isatty() and not is_quiet
        self._console = console_on(is_terminal, stderr=True)
        self._live = Live(console=self._console, get_renderable=self.render, transient=True) if is_terminal else None

    def __enter__(self) -> Self:
        """Begin to show."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show no more."""
        if self._live is not None:
            self._live.stop()

    def add(self, seen: JobView | JobEvent) -> None:
        """Take in what is known, or what has happened."""
        self._waiting = ""
        self._tell(self._add_view(seen) if isinstance(seen, JobView) else self._add_event(seen))

    def say_waiting(self, reason: str) -> None:
        """Take in that the server is away, and why; said once until it is back."""
        if not self._waiting and self._view is not None:
            self._tell(f"waiting for the server: {reason}")
        self._waiting = reason

    def _tell(self, line: str) -> None:
        if line and self._live is None and not self._is_quiet:
            self._console.print(printable(line))

    def _add_view(self, view: JobView) -> str:
        self._view, self._state, self._round = view, view.state, max(self._round, view.round)
        self._clients |= {client.name: client.state or self._clients.get(client.name, "") for client in view.clients}
        waiting = waiting_text(view)
        return "" if view.state in ENDED else f"{view.job_id} {view.state}{f': waits for {waiting}' if waiting else ''}"

    def _add_event(self, event: JobEvent) -> str:
        match event.kind:
            case EventType.ROUND_DONE if event.round:  # round 0 is the initial model
                self._round = event.round
                self._rounds.append((event.round, event.metrics))
                total = f"/{self._view.rounds}" if self._view is not None and self._view.rounds else ""
                return f"round {event.round}{total}  {metrics_text(event.metrics)}"
            case EventType.JOB_STARTED:
                self._state = "running"
                return f"{event.job_id} running"
            case EventType.TASK_SENT | EventType.RESULT_ACCEPTED:
                self._clients[event.client] = f"{_DOING[event.kind]} (round {event.round})"
                if not event.text:
                    return ""
                remark = f"{event.client}: {event.text}"
            case kind if kind in _REMARKABLE:
                self._clients[event.client] = kind.removeprefix("client_")
                remark = f"{event.client} {self._clients[event.client]}{f': {event.text}' if event.text else ''}"
            case _:
                return ""
        self._remarks.append(remark)
        return remark

    def render(self) -> Group:
        """Return the display for a terminal."""
        if self._view is None:
            return Group(Text("asking the server", style="dim"))
        view = self._view
        head = Table.grid(padding=(0, 2))
        total = view.rounds or None
        head.add_row(
            Text(view.job_id, style="bold"),
            Text(self._state),
            ProgressBar(total=total, completed=self._round, width=30) if total else "",
            Text(f"round {self._round}{f'/{total}' if total else ''}"),
        )
        parts: list[Table | Text] = [Text(), head]
        if (waiting := waiting_text(view)) and self._state == view.state:
            parts.append(_text(f"waits for {waiting}", "yellow"))
        parts += [self._client_table(), self._round_table()]
        parts += [_text(remark, "yellow") for remark in self._remarks]
        if self._waiting:
            parts.append(_text(f"waiting for the server: {self._waiting}", "red"))
        return Group(*parts)

    def _client_table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name in sorted(self._clients)[:SHOWN_CLIENTS]:
            table.add_row(Text(f"  {name}", style="cyan"), Text(self._clients[name], style="dim"))
        if len(self._clients) > SHOWN_CLIENTS:
            table.add_row(Text(f"  and {len(self._clients) - SHOWN_CLIENTS} more", style="dim"))
        return table

    def _round_table(self) -> Table:
        names = sorted({name for _, metrics in self._rounds for name in metrics})
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
        if not self._rounds:
            return table
        table.add_column("  round", justify="right")
        for name in names:
            table.add_column(_text(name), justify="right")
        for number, metrics in self._rounds:
            table.add_row(str(number), *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names))
        return table


def _text(words: str, style: str = "") -> Text:
    """Return *words*, of which another machine may have written a part, as text that no terminal obeys."""
    return Text(printable(words), style=style)
