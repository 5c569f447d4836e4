"""aioquic's connection, set up for a link: windows that follow the reader, and bad networks.

Three things in it are other than aioquic's own. Windows of flow control are raised with what was
read, and not doubled with what was sent. The pacer lets packets go in bursts as long as a timer is
late. And what was taken for lost and arrives all the same teaches patience: the thresholds of
packets and of time by which losses are found are raised to what was seen (RFC 9002, 6.1), and the
congestion window gets back what it was reduced by. Without that, a path that delays packets by a
millisecond more or less lets a tenth of its rate through.

Invariants:

1. What a peer makes us hold, of bytes that cannot be given to the owner yet, is bounded by
   `MAX_DATA_BYTES`, whatever is sent in which order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aioquic.quic.connection import (
    CONNECTION_LIMIT_FRAME_CAPACITY,
    MAX_STREAM_DATA_FRAME_CAPACITY,
    QuicConnection,
    QuicConnectionState,
)
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.recovery import (
    K_PACKET_THRESHOLD,
    K_TIME_THRESHOLD,
    QuicPacketPacer,
    QuicPacketRecovery,
)
from aioquic.tls import Epoch

from ..proto.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aioquic.quic.configuration import QuicConfiguration
    from aioquic.quic.events import ConnectionTerminated
    from aioquic.quic.packet_builder import QuicPacketBuilder, QuicSentPacket
    from aioquic.quic.rangeset import RangeSet
    from aioquic.quic.recovery import QuicPacketSpace
    from aioquic.quic.stream import QuicStream

#: Flow control of QUIC: above what credits allow for, so that it never is what holds up.
MAX_DATA_BYTES: Final = 16 * MIB
MAX_STREAM_BYTES: Final = 8 * MIB
#: Time of packets that the pacer lets go at once: timers of the kernel have milliseconds.
PACER_BURST_S: Final = 0.002
#: Where patience ends: in round trips, and in packets. A packet that comes later is as good as
#: lost, and was sent again.
TIME_THRESHOLD_MAX: Final = 2.5
PACKET_THRESHOLD_MAX: Final = 1 << 16
#: Packets taken for lost that are remembered; those of a few round trips.
LOST_PACKETS: Final = 512


class _Pacer(QuicPacketPacer):
    """aioquic's pacer, for timers that come a millisecond late."""

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        super().update_rate(congestion_window, smoothed_rtt)
        self.bucket_max = max(self.bucket_max, PACER_BURST_S)


@dataclass(slots=True)
class _Reduction:
    """What the congestion window was before losses, and the packets that were taken for lost."""

    window: int
    threshold: int | None
    packets: set[int]


class _Recovery(QuicPacketRecovery):
    """aioquic's recovery of losses, that learns how far packets overtake each other."""

    packet_threshold: int
    time_threshold: float
    #: Packets taken for lost, with the time when each was sent; oldest first.
    _lost: dict[int, float]
    _reduction: _Reduction | None

    @classmethod
    def take_over(cls, recovery: QuicPacketRecovery) -> _Recovery:
        """Make one that has not begun one that learns."""
        recovery.__class__ = cls
        assert isinstance(recovery, cls)
        recovery.packet_threshold = K_PACKET_THRESHOLD
        recovery.time_threshold = K_TIME_THRESHOLD
        recovery._lost = {}
        recovery._reduction = None
        return recovery

    def on_ack_received(
        self, *, ack_rangeset: RangeSet, ack_delay: float, now: float, space: QuicPacketSpace
    ) -> None:
        if self._lost and space.is_application_data:
            for number in [n for n in self._lost if n in ack_rangeset]:
                self._learn(number, now, space)
        super().on_ack_received(
            ack_rangeset=ack_rangeset, ack_delay=ack_delay, now=now, space=space
        )

    def _learn(self, number: int, now: float, space: QuicPacketSpace) -> None:
        """One that was taken for lost has arrived."""
        sent_time = self._lost.pop(number)
        distance = space.largest_acked_packet - number
        if distance >= self.packet_threshold:
            self.packet_threshold = min(2 * distance, PACKET_THRESHOLD_MAX)
        late = 1.25 * (now - sent_time) / max(self._rtt_smoothed, self._rtt_min)
        self.time_threshold = max(self.time_threshold, min(late, TIME_THRESHOLD_MAX))
        reduction = self._reduction
        if reduction is not None and number in reduction.packets:
            reduction.packets.discard(number)
            if not reduction.packets:
                # None of them was lost: there was no congestion.
                self._reduction = None
                control = self._cc
                control.congestion_window = max(control.congestion_window, reduction.window)
                control.ssthresh = reduction.threshold

    def _detect_loss(self, *, now: float, space: QuicPacketSpace) -> None:
        rtt_s = max(self._rtt_latest, self._rtt_smoothed) or self._rtt_initial
        patience_s = self.time_threshold * rtt_s
        lost = []
        space.loss_time = None
        for packet in space.sent_packets.values():
            assert packet.sent_time is not None
            behind = space.largest_acked_packet - packet.packet_number
            if behind < 0:
                break
            # The same sum as for the timer, or rounding would let it fire for ever.
            lost_at = packet.sent_time + patience_s
            if behind >= self.packet_threshold or lost_at <= now:
                lost.append(packet)
            elif space.loss_time is None or lost_at < space.loss_time:
                space.loss_time = lost_at
        self._on_packets_lost(
            now=now,
            packets=lost,
            persistent_congestion=self._in_persistent_congestion(packets=lost),
            space=space,
        )

    def _on_packets_lost(
        self,
        *,
        congestion_event: bool = True,
        now: float,
        packets: Iterable[QuicSentPacket],
        persistent_congestion: bool = False,
        space: QuicPacketSpace,
    ) -> None:
        packets = list(packets)
        # Those in flight, with the time when each was sent.
        times = {p.packet_number: p.sent_time for p in packets if p.in_flight and p.sent_time}
        window, threshold = self._cc.congestion_window, self._cc.ssthresh
        super()._on_packets_lost(
            congestion_event=congestion_event,
            now=now,
            packets=packets,
            persistent_congestion=persistent_congestion,
            space=space,
        )
        if not congestion_event or not space.is_application_data:
            return
        self._lost.update(times)
        while len(self._lost) > LOST_PACKETS:
            del self._lost[next(iter(self._lost))]
        if self._cc.congestion_window < window:
            self._reduction = _Reduction(window, threshold, set(times))
        elif self._reduction is not None:
            self._reduction.packets.update(times)


class TransportConnection(QuicConnection):
    """aioquic's connection, with windows that follow what was read."""

    def __init__(
        self, configuration: QuicConfiguration, first_id: bytes | None, retry_id: bytes | None
    ) -> None:
        """Make a connection; a server's has a `first_id`."""
        super().__init__(
            configuration=configuration,
            original_destination_connection_id=first_id,
            retry_source_connection_id=retry_id,
        )
        self._loss._pacer = _Pacer(max_datagram_size=configuration.max_datagram_size)
        _Recovery.take_over(self._loss)
        #: Bytes of streams that were given to the owner.
        self.read_bytes = 0
        self._window_bytes = configuration.max_data
        self._is_first_packet = True
        #: Whether the packet that is being written may have limits.
        self._has_limits = True

    @property
    def ending(self) -> ConnectionTerminated | None:
        """How it has ended, as soon as that is known: its event comes after a wait for echoes."""
        return self._close_event

    @property
    def is_ended_by_peer(self) -> bool:
        """Whether the peer has closed it."""
        return self._state is QuicConnectionState.DRAINING

    def send_probe(self) -> None:
        """Let one datagram go, whatever waits for an acknowledgement (case 13).

        After some seconds without any, aioquic's own probes are many seconds apart.
        """
        self._send_probe()

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """As aioquic's, but an acknowledgement that is due soon goes with data that goes now."""
        self._is_first_packet = True
        space = self._spaces.get(Epoch.ONE_RTT)
        if space is not None and space.ack_at is not None and space.ack_at > now:
            loss = self._loss
            has_room = loss.bytes_in_flight < loss.congestion_window
            if has_room and any(not one.sender.buffer_is_empty for one in self._streams_queue):
                space.ack_at = now
        return super().datagrams_to_send(now)

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        """Raise MAX_DATA with what was read: aioquic doubles it with what was sent.

        Limits stand in the first packet of those that go at once: they do not change meanwhile.
        """
        self._has_limits, self._is_first_packet = self._is_first_packet, False
        if not self._has_limits:
            return
        limit = self._local_max_data
        wanted = self.read_bytes + self._window_bytes
        if wanted - limit.sent >= self._window_bytes // 2 or limit.sent != limit.value:
            limit.value = max(wanted, limit.value)
            buffer = builder.start_frame(
                limit.frame_type,
                capacity=CONNECTION_LIMIT_FRAME_CAPACITY,
                handler=self._on_connection_limit_delivery,
                handler_args=(limit,),
            )
            buffer.push_uint_var(limit.value)
            limit.sent = limit.value
        # The limits on streams, by aioquic, without its doubling.
        used, limit.used = limit.used, 0
        try:
            super()._write_connection_limits(builder, space)
        finally:
            limit.used = used

    def _write_stream_limits(
        self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream
    ) -> None:
        """As for the connection: one byte far ahead must not make us hold all before it."""
        if not self._has_limits:
            return
        window = self._configuration.max_stream_data
        if not stream.max_stream_data_local or stream.receiver.is_finished:
            return
        wanted = stream.receiver.starting_offset() + window
        sent = stream.max_stream_data_local_sent
        if wanted - sent >= window // 2 or sent != stream.max_stream_data_local:
            stream.max_stream_data_local = max(wanted, stream.max_stream_data_local)
            buffer = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            assert stream.stream_id is not None
            buffer.push_uint_var(stream.stream_id)
            buffer.push_uint_var(stream.max_stream_data_local)
            stream.max_stream_data_local_sent = stream.max_stream_data_local
