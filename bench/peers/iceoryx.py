"""iceoryx2: shared memory, polled without a pause, or waited for with its events."""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ..wire import BlockingWire, End, System

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..stage import Player, Stage
    from ..wire import Traffic

#: Messages that lie before a reader.
QUEUE: Final = 256
LARGE_QUEUE: Final = 16


class IceoryxWire(BlockingWire):
    """A service each way. A publisher waits while a reader's queue is full."""

    def __init__(self, stage: Stage, traffic: Traffic, has_events: bool) -> None:
        """Choose names; a machine has one name space for all."""
        super().__init__(stage, traffic)
        self._has_events = has_events
        self._name = f"afbus-bench/{os.getpid()}/{stage.folder.name}"

    @contextlib.contextmanager
    def end(self, role: str, player: Player) -> Iterator[End]:
        """Return an end."""
        # Not in the parent: it begins a thread, which is not there after a fork.
        import iceoryx2

        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        kind = iceoryx2.ServiceType.Ipc
        builder = iceoryx2.NodeBuilder.new()
        node = builder.signal_handling_mode(iceoryx2.SignalHandlingMode.Disabled).create(kind)
        there = self._service(iceoryx2, node, "there", self.traffic.readers)
        back = self._service(iceoryx2, node, "back", 1) if role in ("echo", "ping") else None
        ways = {"echo": (there, back), "ping": (back, there), "source": (None, there)}
        heard, said = ways.get(role, (there, None))
        yield IceoryxEnd(iceoryx2, heard, said, self.traffic)

    def _service(self, iceoryx2: Any, node: Any, way: str, readers: int) -> tuple[Any, Any]:
        """Return the services of one way: messages, and events if there are."""
        queue = QUEUE if self.traffic.size < 1 << 16 else LARGE_QUEUE
        name = iceoryx2.ServiceName.new(f"{self._name}/{way}")
        messages = (
            node.service_builder(name)
            .publish_subscribe(iceoryx2.Slice[ctypes.c_uint8])
            .enable_safe_overflow(False)
            .subscriber_max_buffer_size(queue)
            .max_subscribers(readers)
            .max_nodes(readers + 4)
            .open_or_create()
        )
        if not self._has_events:
            return messages, None
        events = (
            node.service_builder(name)
            .event()
            .max_listeners(readers)
            .max_nodes(readers + 4)
            .open_or_create()
        )
        return messages, events


class IceoryxEnd(End):
    """A publisher and a subscriber, with a notifier and a listener if there are events."""

    def __init__(self, iceoryx2: Any, heard: Any, said: Any, traffic: Traffic) -> None:
        """Make the ports of both ways, if there are both."""
        self.send, self.receive = self._send, self._receive
        self._size = traffic.size
        self._copies = traffic.mode != "loan" and traffic.size < 1 << 16
        self._view = ctypes.c_uint8 * traffic.size
        self._listener = self._notifier = None
        if heard is not None:
            messages, events = heard
            self._subscriber = messages.subscriber_builder().create()
            if events is not None:
                self._listener = events.listener_builder().create()
        if said is not None:
            messages, events = said
            self._publisher = (
                messages.publisher_builder()
                .initial_max_slice_len(traffic.size)
                .backpressure_strategy(iceoryx2.BackpressureStrategy.RetryUntilDelivered)
                .create()
            )
            if events is not None:
                self._notifier = events.notifier_builder().create()

    def _send(self, body: bytes) -> None:
        # Written in place.
        sample = self._publisher.loan_slice_uninit(self._size)
        ctypes.memmove(sample.payload_ptr, body, self._size)
        sample.assume_init().send()
        if self._notifier is not None:
            self._notifier.notify()

    def _receive(self) -> Any:
        # Small ones as bytes, large ones in place, read at both ends.
        receive = self._subscriber.receive
        while (sample := receive()) is None:
            if self._listener is not None:
                self._listener.blocking_wait()
        if self._copies:
            data = ctypes.string_at(sample.payload_ptr, self._size)
        else:
            view = self._view.from_address(sample.payload_ptr)
            data = bytes((view[0], view[-1]))
        sample.delete()
        return data


def _system(name: str, has_events: bool) -> System:
    return System(name, partial(IceoryxWire, has_events=has_events), ("iceoryx2",))


POLLED: Final = _system("iceoryx2", has_events=False)
EVENTS: Final = _system("iceoryx2 events", has_events=True)
