"""What a request carries, checked: a handler says which payload it expects, and gets that or a refusal."""

from typing import TypeVar

import msgspec

from hanse.errors import ProtocolError
from hanse.messages import Message

P = TypeVar("P", bound=msgspec.Struct)


def expect(message: Message, kind: type[P]) -> P:
    """Return *message*'s payload, which must be a *kind*.

    Raises:
        ProtocolError: it is something else, or there is none.
    """
    if not isinstance(message.payload, kind):
        got = None if message.payload is None else type(message.payload).__name__
        raise ProtocolError("payload", got=got, expected=kind.__name__)
    return message.payload
