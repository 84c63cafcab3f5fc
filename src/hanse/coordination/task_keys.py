"""Which number a task has among those of its name, round and client.

It follows from what is asked, so a workflow that is called again for the same round after a crash finds the answers to
the questions that it asks, in whatever order it comes to ask them: asks that run side by side take turns as answers
come, and a client that was lost the last time may be there now, so that the next one gets another model. An answer to
another question is none: that task is a new one.
"""

import hashlib
from typing import Final

import msgspec

from hanse.job import Config
from hanse.messages import ModelRef, TaskKey

FIRST_SEQUENCE: Final = 2**30
"""From here to the largest number that a store holds are the numbers that follow from a task's content. Release 0.1.0
counted the asks of a name to a client from 0; the round that it was at goes on as it began."""

_encoder = msgspec.msgpack.Encoder(order="deterministic")  # a dict says the same in any order


def content_of(model: ModelRef | None, config: Config, *, expects_model: bool) -> bytes:
    """Return what tells a task that asks this from one that asks something else."""
    return hashlib.blake2b(_encoder.encode((model, config, expects_model)), person=b"hanse task").digest()


def sequence_of(content: bytes, number: int) -> int:
    """Return the sequence of the task of this *content* that is asked of its client for the *number*-th time."""
    digest = hashlib.blake2b(content + number.to_bytes(8, "little"), person=b"hanse sequence", digest_size=4).digest()
    return FIRST_SEQUENCE + int.from_bytes(digest, "little") % FIRST_SEQUENCE


def is_counted(key: TaskKey) -> bool:
    """Return whether the task was asked by release 0.1.0, which counted."""
    return key.sequence < FIRST_SEQUENCE
