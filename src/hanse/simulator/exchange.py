"""What a pool and its workers say to each other: one msgpack message a frame, after four bytes of its length.

A worker is asked one thing at a time and answers it once; what training code logs meanwhile comes before the answer.
Answers carry the number of what they answer, so that a thread which the code left behind and which logs later is not
taken for the next task's. Models travel by reference: small tensors ride along, the others are files both sides map.
"""

import struct
import threading
from socket import socket
from typing import Final, TypeAlias

import msgspec

from hanse.client.api import Site
from hanse.errors import ProtocolError
from hanse.ids import ClientName, JobId
from hanse.job import Config
from hanse.messages import Metrics, ModelRef, UpdateRef

LENGTH: Final = struct.Struct(">I")
MAX_FRAME_BYTES: Final = 1024**3
"""Tensors that ride along are small; a model of very many of them still fits."""


class WorkerSpec(msgspec.Struct, frozen=True):
    """What a worker is told when it starts: the descriptor of its socket to the pool.

    A worker for functions serves any client and job. One for a script is a single client's: *script* is the file, in
    the folder *code*, and *site* where it runs.
    """

    channel: int
    script: str = ""
    code: str = ""
    site: Site | None = None


class Load(msgspec.Struct, frozen=True, tag=True):
    """Import the app *reference* from the folder *code*, on behalf of *client*."""

    number: int
    code: str
    reference: str
    client: ClientName


class Work(msgspec.Struct, frozen=True, tag=True):
    """Work on a task with the app *reference* of the folder *code*; tensors are files in *tensors*.

    The rest is ``hanse.client.task.TaskContext``, field by field.
    """

    number: int
    code: str
    reference: str
    tensors: str
    model: ModelRef
    client: ClientName
    job: JobId
    round: int
    name: str
    config: Config
    site: Config
    seed: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The app is there."""

    number: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """The code returned an update; its tensors are files now."""

    number: int
    update: UpdateRef


class Raised(msgspec.Struct, frozen=True, tag=True):
    """The code raised, or is not what it should be; *why* says so, ``Type: message (file:line)``."""

    number: int
    why: str


class Unimportable(msgspec.Struct, frozen=True, tag=True):
    """The code raised *error* while *python*, a version, imported it."""

    number: int
    error: str
    python: str


class Missing(msgspec.Struct, frozen=True, tag=True):
    """The code imports *module*, at *place*, which is not installed."""

    number: int
    module: str
    place: str


class Invalid(msgspec.Struct, frozen=True, tag=True):
    """The app cannot be imported, or is none: what was *expected* instead."""

    number: int
    expected: str


class Broken(msgspec.Struct, frozen=True, tag=True):
    """The script ended before it ever had a task, by this failure: it will never have one."""

    failure: Raised | Unimportable | Missing


class Faulty(msgspec.Struct, frozen=True, tag=True):
    """The worker could not do its part (a full disk, a tensor that is gone): *why* is the sentence."""

    number: int
    why: str


class Logged(msgspec.Struct, frozen=True, tag=True):
    """The code logged *metrics* while it worked."""

    number: int
    step: int
    metrics: Metrics


Request: TypeAlias = Load | Work
Failure: TypeAlias = Raised | Unimportable | Missing
Answer: TypeAlias = Loaded | Done | Failure | Invalid | Broken | Faulty
Said: TypeAlias = Answer | Logged

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_said: msgspec.msgpack.Decoder[Said] = msgspec.msgpack.Decoder(Said)


def encode(message: Request | Said) -> bytes:
    """Return *message* as a frame.

    Raises:
        ProtocolError: it is too large for one.
    """
    payload = _encoder.encode(message)
    check_length(len(payload))
    return LENGTH.pack(len(payload)) + payload


def decode_said(payload: bytes) -> Said:
    """Return what a worker said in a frame with this *payload*.

    Raises:
        ProtocolError: it is nothing that a worker says.
    """
    try:
        return _said.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise ProtocolError("a worker's frame", got=payload[:32], expected=f"an answer ({error})") from error


def check_length(length: int) -> None:
    """Raise unless a frame may have *length* bytes.

    Raises:
        ProtocolError: it may not.
    """
    if length > MAX_FRAME_BYTES:
        raise ProtocolError("length of a frame between pool and worker", got=length, expected=f"≤ {MAX_FRAME_BYTES}")


class Channel:
    """A worker's end: ``read`` for one thread, ``write`` for all."""

    def __init__(self, connection: socket) -> None:
        self._connection = connection
        self._reading = connection.makefile("rb")
        self._writing = threading.Lock()

    def read(self) -> Request | None:
        """Wait for the next request; ``None``: there will be no more."""
        head = self._reading.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        length = LENGTH.unpack(head)[0]
        payload = self._reading.read(length)
        return _requests.decode(payload) if len(payload) == length else None

    def write(self, message: Said) -> None:
        """Say *message*.

        Raises:
            OSError: the pool is gone.
        """
        frame = encode(message)
        with self._writing:
            self._connection.sendall(frame)
