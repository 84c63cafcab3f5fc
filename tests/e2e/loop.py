"""What lives on the process's one event loop, for tests that do not."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from hanse.cell.loop import run

T = TypeVar("T")


@contextlib.contextmanager
def on_the_loop(context: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Have *context* entered on the process's event loop until the block ends."""
    stack = contextlib.AsyncExitStack()
    value = run(stack.enter_async_context(context))
    try:
        yield value
    finally:
        run(stack.aclose())
