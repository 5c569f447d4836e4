"""What a member chooses for its links: sizes of windows, and how long it waits.

Invariants:

1. What one link holds in memory is bounded by these numbers, whatever its peer does:
   `Settings.receive_bytes` for what arrives, `Settings.in_flight_bytes` for what is sent.
2. A message of the allowed size always fits once its destination has read what it had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..proto.errors import InvalidArgument
from ..proto.limits import KIB, MIB

#: What a message costs beside its bytes: what a receiver keeps to remember it. Without it, empty
#: messages would be free, and a receiver that does not read them would have no bound.
MESSAGE_COST: Final = 128
#: A receiver returns credit in quarters of the window: few frames, and never too late.
RETURN_PART: Final = 4
#: How often a receiver says how much it has read of the link; the sender's bound is far above.
ACK_BYTES: Final = 128 * KIB
#: Bodies that a link may carry at a time: aioquic ends at 128 streams, without a word.
BODIES_MAX: Final = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and times of a link; both ends may differ, and learn of each other's windows.

    Attributes:
        window_bytes: What one destination, or one body, may have unread: the credit of a sender.
            One window a round trip is what a destination can get: 2 MiB over 50 ms are 40 MiB/s.
        destinations: Destinations that a peer may have open at a time, on all channels.
        bodies: Bodies that a peer may have unread at a time.
        message_bytes: The largest message that is received; a larger one goes as a body. The
            largest that anybody sends are frames of the cluster's tables, of up to 128 KiB
            (`CLUSTER_FRAME_BYTES`); the rest is room for those of newer versions.
        in_flight_bytes: What may be sent and not yet read by the peer's end of the link.
        beat_s: How often the link is tried; each try takes both ends some 0.2 ms of their CPUs.
        silent_s: A try that is not confirmed after this time: the peer is `Silent` (case 14).
        idle_s: The same for the end of the link (case 13: 4 s without a packet lose nothing).
        hello_s: How long a peer that has been heard may take for its handshake and its HELLO.
        flush_s: How long an orderly close waits until the peer has read everything (D20).
    """

    window_bytes: int = 2 * MIB
    destinations: int = 16
    bodies: int = 16
    message_bytes: int = 1 * MIB
    in_flight_bytes: int = 8 * MIB
    beat_s: float = 0.8
    silent_s: float = 1.8
    idle_s: float = 10.0
    hello_s: float = 5.0
    flush_s: float = 2.0

    def __post_init__(self) -> None:
        """Check that the sizes fit together.

        Raises:
            InvalidArgument: They do not. EINVAL.
        """
        kept_back = self.window_bytes // RETURN_PART
        if not 0 < self.message_bytes <= self.window_bytes - kept_back - MESSAGE_COST:
            raise InvalidArgument(
                f"messages of {self.message_bytes} bytes do not fit into windows of "
                f"{self.window_bytes} of which a quarter may be kept back"
            )
        if self.in_flight_bytes < ACK_BYTES + self.message_bytes + KIB:
            raise InvalidArgument(f"{self.in_flight_bytes} bytes in flight hold no message")
        if self.destinations < 1 or not 1 <= self.bodies <= BODIES_MAX:
            raise InvalidArgument(f"a link needs a destination, and 1 to {BODIES_MAX} bodies")
        if not 0 < self.beat_s < self.silent_s < self.idle_s:
            raise InvalidArgument("beats must be shorter than silence, and that than the end")

    @property
    def receive_bytes(self) -> int:
        """The most that a link holds of what its peer sent: all windows full."""
        return self.window_bytes * (self.destinations + self.bodies)
