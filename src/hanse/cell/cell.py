"""A cell: an address in the message network that asks others, and answers what it is asked.

A cell has links, handlers by topic, and nothing else. ``ask`` sends a request over the link to its destination (or, on
a cell with one peer that routes, over that) and waits for the reply on the same link. What arrives passes, in this
order: the stamp (who sent it is what the link knows, never what the frame says), the gate (may this peer use this
topic), the decoding of the payload, the handler. Each step that fails is answered with a return code and a sentence.

A handler that is a plain function runs at once, in the order of arrival, at the cost of a call. One that returns an
awaitable gets a task if it answers a request, so that requests of one peer do not wait for each other, at most
``MAX_IN_FLIGHT`` of them a link; beyond that the link is not read until one has ended. Events of one link are handled
one after the other.
"""

import asyncio
import inspect
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from hanse.cell.frames import Frame, FrameKind, decode_payload, encode_payload, topic_of
from hanse.cell.link import Link, Peer
from hanse.cell.refusals import RemoteError, RemoteFault, error_from, refuse
from hanse.errors import Conflict, HanseError, InternalError, ProtocolError, TimedOut, Unauthorized, Unreachable
from hanse.ids import Fqcn
from hanse.messages import Channel, Credentials, Header, Message, Payload, ReturnCode, Topic, ok

__all__ = ["Cell", "Gate", "Handler", "RemoteError", "RemoteFault", "Route", "current_peer"]

MAX_IN_FLIGHT: Final = 64
MAX_ASKED: Final = MAX_IN_FLIGHT - 1
"""Requests of one link that wait for their replies; further ones wait to be sent, or the peer would cease to read, and
what it is told in the course of answering, or asks itself, would wait behind them."""
MAX_QUEUED_EVENTS: Final = 256
MAX_PASSED_ON: Final = 1024
"""Requests passed on over one link whose replies may still come; beyond that the oldest is forgotten."""

Handler: TypeAlias = Callable[[Message], "Message | Awaitable[Message | None] | None"]
"""Answers a message; ``None`` is an OK without payload, and a ``HanseError`` raised is a refusal with its sentence."""

Gate: TypeAlias = Callable[[Peer, Topic, Message], None]
"""Raises to refuse a peer's message before its payload is decoded: the message has headers only."""

Route: TypeAlias = Callable[[Peer, Frame], None]
"""Raises to refuse to pass a peer's frame on to ``frame.destination``."""

_log = logging.getLogger(__name__)
_peer: ContextVar[Peer | None] = ContextVar("hanse peer", default=None)
_STAMPED: Final = (Header.ORIGIN, Header.CLIENT, Header.TOKEN, Header.TOKEN_SIGNATURE, Header.ROLE)
_SECRETS: Final = (Header.TOKEN, Header.TOKEN_SIGNATURE)


def current_peer() -> Peer | None:
    """Return the peer whose message the running handler answers; ``None`` where a handler is called directly."""
    return _peer.get()


@dataclass(slots=True, frozen=True)
class _Waiting:
    destination: Fqcn
    topic: Topic
    future: asyncio.Future[Message]


class _Attached:
    """What a cell keeps of one link: what it waits for there, what it does for the peer, what it passed on to it."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.waiting: dict[int, _Waiting] = {}
        self.places = asyncio.Semaphore(MAX_ASKED)
        self.passed_on: dict[tuple[Fqcn, int], Link] = {}
        self.in_flight = 0
        self.events: deque[Frame] = deque()
        self.is_draining = False
        self._changed: asyncio.Future[None] | None = None

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait until *holds*. Only the link's reader waits here, so one future is enough."""
        while not holds():
            self._changed = asyncio.get_running_loop().create_future()
            await self._changed

    def has_changed(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


class Cell:
    """An endpoint of the message network, by the address *fqcn*.

    Without *gate* every peer may use every topic that has a handler; without *route* nothing is passed on. ``headers``
    go out with every request and event of this cell. Belongs to one event loop. ``close`` ends its links and handlers.
    """

    def __init__(self, fqcn: Fqcn, *, gate: Gate | None = None, route: Route | None = None) -> None:
        self.fqcn = fqcn
        self.headers: dict[str, str] = {}
        self.target: str | None = None
        """Where it can be reached, once it listens somewhere."""
        self._gate, self._route = gate, route
        self._handlers: dict[Topic, Handler] = {}
        self._attached: dict[Link, _Attached] = {}
        self._by_peer: dict[Peer, _Attached] = {}
        self._by_fqcn: dict[Fqcn, _Attached] = {}
        self._router: _Attached | None = None
        self._up_hooks: list[Callable[[Peer], None]] = []
        self._down_hooks: list[Callable[[Peer, str], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = itertools.count(1)

    # Whom it knows ----------------------------------------------------------------------------------------------------

    def on(self, channel: Channel, topic: str, handler: Handler) -> None:
        """Let *handler* answer *topic* on *channel*, in place of the one before."""
        self._handlers[channel, topic] = handler

    def on_link_up(self, hook: Callable[[Peer], None]) -> None:
        """Call *hook* whenever a peer becomes reachable under its address."""
        self._up_hooks.append(hook)

    def on_link_down(self, hook: Callable[[Peer, str], None]) -> None:
        """Call *hook* with the reason whenever a peer that was reachable under its address no longer is."""
        self._down_hooks.append(hook)

    def peers(self) -> list[Peer]:
        """Return the peers that can be asked, by address."""
        return [self._by_fqcn[fqcn].link.peer for fqcn in sorted(self._by_fqcn)]

    def peer(self, fqcn: Fqcn) -> Peer | None:
        """Return the peer that *fqcn* reaches; ``None`` when it is not connected."""
        attached = self._by_fqcn.get(fqcn)
        return attached.link.peer if attached else None

    def attach(self, link: Link) -> None:
        """Let *link* deliver to this cell; if its peer is proven, what is for that peer's address goes there.

        A link that had the address before is told that it was replaced, and ends. A link that has ended is detached.
        """
        self._attached[link] = self._by_peer[link.peer] = _Attached(link)
        link.closed.add_done_callback(lambda closed: self.detach(link, closed.result().reason))
        if link.peer.proven:
            self._bring_up(self._attached[link])

    def prove(self, peer: Peer, *, kind: str, credentials: Credentials | None, role: str = "") -> None:
        """Take *peer* for what it has just proven to be: from now on its link is the one to ``peer.fqcn``."""
        peer.kind, peer.credentials, peer.role, peer.proven = kind, credentials, role, True
        attached = self._by_peer.get(peer)
        if attached is not None and self._by_fqcn.get(peer.fqcn) is not attached:
            self._bring_up(attached)

    def detach(self, link: Link, reason: str) -> None:
        """Forget *link*; who waits for an answer over it gets ``Unreachable`` with *reason*. Twice is once."""
        attached = self._attached.pop(link, None)
        if attached is None:
            return
        del self._by_peer[link.peer]
        if self._router is attached:
            self._router = None
        for waiting in attached.waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(Unreachable(waiting.destination, reason))
        if self._by_fqcn.get(link.peer.fqcn) is attached:
            del self._by_fqcn[link.peer.fqcn]
            for hook in self._down_hooks:
                _call_hook(hook, link.peer, reason)

    def drop(self, fqcn: Fqcn, error: HanseError) -> None:
        """End the link to *fqcn*, if there is one; its peer is told of *error*."""
        attached = self._by_fqcn.get(fqcn)
        if attached is not None:
            attached.link.close_nowait(error)

    async def close(self) -> None:
        """End all links and handlers, and return when they have ended."""
        links = list(self._attached)
        leaving = Unreachable(self.fqcn, "it has closed")
        await asyncio.gather(*(link.close(leaving) for link in links))
        for link in links:
            self.detach(link, leaving.reason)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Asking -----------------------------------------------------------------------------------------------------------

    async def ask(
        self,
        destination: Fqcn,
        channel: Channel,
        topic: str,
        payload: Payload = None,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        link: Link | None = None,
    ) -> Message:
        """Return the reply of *destination* to a request; over *link*, where one is given that is not up yet.

        Raises:
            Unreachable: there is no link to *destination*, or it broke before the reply came.
            TimedOut: no reply within *timeout_s*.
            ProtocolError: *payload* is not of the topic's type or too large, or the reply's is not.
            Unauthenticated, NotInService, RemoteError: what *destination* answered.
        """
        attached = self._link_to(destination, link)
        frame = self._frame(FrameKind.REQUEST, destination, (channel, topic), payload, headers)
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s), attached.places:
                attached.link.send_nowait(frame)
                attached.waiting[frame.id] = _Waiting(destination, (channel, topic), future)
                return await future
        except TimeoutError:
            raise TimedOut(destination, f"{channel.value}/{topic}", timeout_s) from None
        finally:
            attached.waiting.pop(frame.id, None)

    def tell(
        self,
        destination: Fqcn,
        channel: Channel,
        topic: str,
        payload: Payload = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Send an event to *destination*; nobody answers, and it is lost if the link breaks before it is there.

        Raises:
            Unreachable: there is no link to *destination*.
            ProtocolError: *payload* is not of the topic's type, or too large.
        """
        attached = self._link_to(destination, None)
        attached.link.send_nowait(self._frame(FrameKind.EVENT, destination, (channel, topic), payload, headers))

    # Being asked ------------------------------------------------------------------------------------------------------

    async def receive(self, link: Link, frame: Frame) -> None:
        """Deal with *frame* from *link*; waits only where the link should not be read on."""
        attached = self._attached.get(link)
        if attached is None:
            return
        if frame.kind not in (FrameKind.REQUEST, FrameKind.REPLY, FrameKind.EVENT):
            raise ProtocolError("frame.kind", got=frame.kind.name, expected="REQUEST, REPLY or EVENT on an open link")
        if not link.peer.routes:
            frame = replace(frame, origin=link.peer.fqcn)
        if frame.kind is FrameKind.REPLY:
            self._take_reply(attached, frame)
        elif frame.destination != self.fqcn:
            self._pass_on(attached, frame)
        elif frame.kind is FrameKind.REQUEST:
            await self._answer(attached, frame)
        else:
            await self._heed(attached, frame)

    async def _answer(self, attached: _Attached, frame: Frame) -> None:
        token = _peer.set(attached.link.peer)
        try:
            handler, message = self._admit(attached.link.peer, frame)
            answer = handler(message)
            if not inspect.isawaitable(answer):
                self._reply(attached, frame, answer)
                return
            attached.in_flight += 1
            self._start(self._finish_answer(attached, frame, answer), name=f"answer {frame.channel}/{frame.topic}")
        except Exception as error:  # noqa: BLE001 - one request's failure is its answer, and hurts no other request
            self._reply_error(attached, frame, error)
        finally:
            _peer.reset(token)
        await attached.wait_until(lambda: attached.in_flight < MAX_IN_FLIGHT)

    async def _finish_answer(self, attached: _Attached, frame: Frame, answer: Awaitable[Message | None]) -> None:
        try:
            self._reply(attached, frame, await answer)
        except Exception as error:  # noqa: BLE001 - as in _answer
            self._reply_error(attached, frame, error)
        finally:
            attached.in_flight -= 1
            attached.has_changed()

    async def _heed(self, attached: _Attached, frame: Frame) -> None:
        attached.events.append(frame)
        if attached.is_draining:
            await attached.wait_until(lambda: len(attached.events) < MAX_QUEUED_EVENTS)
            return
        while attached.events:
            pending = self._hear(attached.link.peer, attached.events.popleft())
            if pending is not None:
                attached.is_draining = True
                self._start(self._drain(attached, pending), name=f"events of {attached.link.peer.fqcn}")
                return

    async def _drain(self, attached: _Attached, pending: Awaitable[object] | None) -> None:
        """Handle the link's queued events one after the other, beginning with the one that is *pending*."""
        try:
            while pending is not None or attached.events:
                if pending is not None:
                    try:
                        await pending
                    except Exception as error:  # noqa: BLE001 - one event's failure hurts no other event
                        _log_event_failure(attached.link.peer, error)
                    pending = None
                else:
                    frame = attached.events.popleft()
                    attached.has_changed()
                    pending = self._hear(attached.link.peer, frame)
        finally:
            attached.is_draining = False

    def _hear(self, peer: Peer, frame: Frame) -> Awaitable[object] | None:
        """Hand an event to its handler; return what is still to be awaited."""
        token = _peer.set(peer)
        try:
            handler, message = self._admit(peer, frame)
            pending = handler(message)
            return pending if inspect.isawaitable(pending) else None
        except Exception as error:  # noqa: BLE001 - one event's failure hurts no other event
            _log_event_failure(peer, error)
            return None
        finally:
            _peer.reset(token)

    def _admit(self, peer: Peer, frame: Frame) -> tuple[Handler, Message]:
        """Return the handler of *frame* and what to call it with: stamp, gate, decode, in this order."""
        topic = topic_of(frame.channel, frame.topic)
        handler = self._handlers.get(topic) if topic else None
        if topic is None or handler is None:
            raise ProtocolError("topic", got=f"{frame.channel}/{frame.topic}", expected=f"one that {self.fqcn} answers")
        message = Message(_stamped(peer, frame))
        if self._gate is not None:
            self._gate(peer, topic, message)
        message.payload = decode_payload(topic, frame.payload)
        return handler, message

    def _reply(self, attached: _Attached, request: Frame, answer: Message | None) -> None:
        reply = answer or ok()
        headers = {Header.RETURN_CODE: ReturnCode.OK.value, **reply.headers}
        topic = topic_of(request.channel, request.topic)
        try:
            is_ok = headers[Header.RETURN_CODE] == ReturnCode.OK
            payload = encode_payload(topic, reply.payload, reply=True) if topic and is_ok else b""
            self._send_reply(attached, request, headers, payload)
        except ProtocolError as error:
            raise InternalError(f"answering {request.channel}/{request.topic} ({error.reason})") from error

    def _reply_error(self, attached: _Attached, request: Frame, error: Exception) -> None:
        if isinstance(error, HanseError) and not isinstance(error, InternalError):
            known = error
        else:
            known = InternalError(f"answering {request.channel}/{request.topic}")
            _log.error("request failed", exc_info=error, extra={"peer": request.origin, "topic": request.topic})
        self._send_reply(attached, request, refuse(known).headers, b"")

    def _send_reply(self, attached: _Attached, request: Frame, headers: dict[str, str], payload: bytes) -> None:
        reply = Frame(
            FrameKind.REPLY, request.id, self.fqcn, request.origin, request.channel, request.topic, headers, payload
        )
        try:
            attached.link.send_nowait(reply)
        except Unreachable:
            _log.debug("reply has nobody to go to", extra={"peer": request.origin, "topic": request.topic})

    def _take_reply(self, attached: _Attached, frame: Frame) -> None:
        asker = attached.passed_on.pop((frame.destination, frame.id), None)
        if asker is not None:
            _send_if_open(asker, replace(frame, headers=_stamped(attached.link.peer, frame, secrets=False)))
            return
        waiting = attached.waiting.get(frame.id)
        # A cell that routes may answer for one that it cannot reach; nobody else answers for another.
        is_expected = waiting is not None and (attached.link.peer.routes or waiting.destination == frame.origin)
        if waiting is None or not is_expected or waiting.future.done():
            _log.debug("reply that nobody waits for", extra={"peer": frame.origin, "topic": frame.topic})
            return
        reply = Message(_stamped(attached.link.peer, frame))
        try:
            if frame.headers.get(Header.RETURN_CODE, ReturnCode.OK) == ReturnCode.OK:
                reply.payload = decode_payload(waiting.topic, frame.payload, reply=True)
            else:
                raise error_from(frame.headers)
        except HanseError as error:
            waiting.future.set_exception(error)
        else:
            waiting.future.set_result(reply)

    # Passing on -------------------------------------------------------------------------------------------------------

    def _pass_on(self, attached: _Attached, frame: Frame) -> None:
        peer = attached.link.peer
        try:
            if self._route is None:
                raise Unauthorized(peer.fqcn, f"send to {frame.destination} by {self.fqcn}", needs="a cell that routes")
            self._route(peer, frame)
            onward = self._by_fqcn.get(frame.destination)
            if onward is None:
                raise Unreachable(frame.destination, f"{self.fqcn} has no link to it")
            onward.link.send_nowait(replace(frame, headers=_stamped(peer, frame, secrets=False)))
        except Exception as error:  # noqa: BLE001 - as in _answer
            if frame.kind is FrameKind.REQUEST:
                self._reply_error(attached, frame, error)
            else:
                _log_event_failure(peer, error)
            return
        if frame.kind is FrameKind.REQUEST:
            onward.passed_on[frame.origin, frame.id] = attached.link
            if len(onward.passed_on) > MAX_PASSED_ON:
                del onward.passed_on[next(iter(onward.passed_on))]

    # Parts ------------------------------------------------------------------------------------------------------------

    def _bring_up(self, attached: _Attached) -> None:
        peer = attached.link.peer
        before = self._by_fqcn.get(peer.fqcn)
        if before is not None:
            replaced = Conflict(f"the stream of {peer.fqcn}", state="replaced by a newer one", wanted="kept")
            self.detach(before.link, replaced.reason)
            before.link.close_nowait(replaced)
        self._by_fqcn[peer.fqcn] = attached
        if peer.routes:
            self._router = attached
        for hook in self._up_hooks:
            _call_hook(hook, peer)

    def _link_to(self, destination: Fqcn, link: Link | None) -> _Attached:
        attached = self._attached.get(link) if link else self._by_fqcn.get(destination) or self._router
        if attached is None:
            raise Unreachable(destination, f"{self.fqcn} has no link to it")
        return attached

    def _frame(
        self, kind: FrameKind, destination: Fqcn, topic: Topic, payload: Payload, headers: Mapping[str, str] | None
    ) -> Frame:
        number = next(self._ids) if kind is FrameKind.REQUEST else 0
        stated = {**self.headers, **(headers or {})}
        return Frame(
            kind, number, self.fqcn, destination, topic[0].value, topic[1], stated, encode_payload(topic, payload)
        )

    def _start(self, work: Coroutine[None, None, None], *, name: str) -> None:
        task = asyncio.create_task(work, name=name)  # awaited by close()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _stamped(peer: Peer, frame: Frame, *, secrets: bool = True) -> dict[str, str]:
    """Return *frame*'s headers with those that say who sent it set from what the link knows.

    A peer that routes has stamped what it passes on, and is believed. A token goes no further than to the cell that
    the peer is linked to.
    """
    if peer.routes and frame.origin != peer.fqcn:
        headers = {key: value for key, value in frame.headers.items() if key not in _SECRETS}
        headers[Header.ORIGIN] = frame.origin
        return headers
    headers = {key: value for key, value in frame.headers.items() if key not in _STAMPED}
    headers[Header.ORIGIN] = peer.fqcn
    if peer.role:
        headers[Header.ROLE] = peer.role
    if peer.credentials is not None:
        headers[Header.CLIENT] = peer.credentials.name
        if secrets:
            headers[Header.TOKEN] = peer.credentials.token
            headers[Header.TOKEN_SIGNATURE] = peer.credentials.signature
    return headers


def _send_if_open(link: Link, frame: Frame) -> None:
    try:
        link.send_nowait(frame)
    except Unreachable:
        _log.debug("reply has nobody to go to", extra={"peer": frame.destination, "topic": frame.topic})


def _call_hook(hook: Callable[..., None], *arguments: object) -> None:
    try:
        hook(*arguments)
    except Exception:  # noqa: BLE001 - one hook's failure hurts neither the link nor the other hooks
        _log.exception("hook of a link failed")


def _log_event_failure(peer: Peer, error: Exception) -> None:
    if isinstance(error, HanseError) and not isinstance(error, InternalError):
        _log.warning("event refused", extra={"peer": peer.fqcn, "reason": error.reason})
    else:
        _log.error("event failed", exc_info=error, extra={"peer": peer.fqcn})
