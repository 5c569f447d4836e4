"""What the policy of the cluster lets endpoints of this node do on its buses: joining, sending,
publishing, monitoring.

The cluster's master decides (ASK), this keeps what it has said in effect: before something is
granted it is asked, and when the policy changes it is asked again, about everything that endpoints
have by such an answer. What they own and hear is a claim instead, which the master takes back by
itself. Where a member may send, its *reach*, comes with the leave to join, as patterns; the switch
judges each message by them (`datapath/src/flow.rs`).

    grant     --judge-->  ASK  --allowed-->  reach into the switch, then the grant
    policy'   --review->  ASK  --allowed-->  reach into the switch
                               --refused-->  evicted (joining), REVOKED (all else)

Invariants:

1. What is put into effect was allowed by the policy that is the present one then, as far as the
   table tells.
2. Nobody loses anything because nobody could be asked: then it is asked again (D16).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from ..proto.address import format_within
from ..proto.control import Grant, GrantFlags, MulticastSend, OwnedAddr
from ..proto.errors import DeadlineExceeded, Denied, MasterLost, NoSuchEndpoint
from ..proto.limits import REASON_BYTES
from ..proto.notice import Event, Notice
from ..proto.text import clip, escape
from . import answer
from .effect import Audit
from .grant import format_what
from .steps import demand
from .verdict import Question

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

    from ..proto.frames import Result
    from .answer import Verdict
    from .effect import Effect
    from .endpoint import Bus, Endpoint
    from .grant import Command
    from .port import SwitchPort
    from .registry import Registry
    from .steps import Steps, Ticket, Tickets
    from .uplink import Uplink

log = logging.getLogger("afbus.node")

_CHANGED: Final = "the policy of the cluster has changed"


class Standing:
    """The endpoints of this node before the policy; `evict` is set before anything is called."""

    def __init__(  # noqa: PLR0913 (what a node consists of)
        self,
        registry: Registry,
        switch: SwitchPort,
        uplink: Uplink,
        tickets: Tickets,
        effects: list[Effect],
        clock: Callable[[], float],
    ) -> None:
        """Begin; effects are appended to `effects`, the core's."""
        self._registry = registry
        self._switch = switch
        self._uplink = uplink
        self._tickets = tickets
        self._effects = effects
        self._clock = clock
        # Whether nobody could be asked when the policy had changed.
        self._is_due = False
        #: Cuts an endpoint off, with the reason.
        self.evict: Callable[[Endpoint, str], None]

    @property
    def policy(self) -> int:
        """The number of the policy that the table tells of."""
        return self._uplink.mirror.get_fact("policy")

    # --- before something is granted ---

    def judge(
        self, target: Endpoint, changes: Iterable[Command]
    ) -> Generator[Ticket, Result, tuple[str, ...] | None]:
        """Ask whether an endpoint may have what commands give it.

        Returns:
            Where it may send as a member; None if it does not become one by this.

        Raises:
            Denied: It may not. EPERM.
            MasterLost: Nobody can be asked. EHOSTDOWN.
        """
        reach = None
        for question in dict.fromkeys(_questions_of(target, changes)):
            verdict = yield from self._find_out(question)
            if not verdict.is_allowed:
                raise Denied(_denied(verdict.reason))
            if question.address is not None:
                reach = verdict.reach
        return reach

    def _find_out(self, question: Question) -> Generator[Ticket, Result, Verdict]:
        now = self._clock()
        verdict = self._uplink.find_verdict(question, now)
        if verdict is None:
            verdict = answer.take_verdict(demand((yield self._uplink.ask(question, now))))
        return verdict

    def set_reach(self, endpoint: Endpoint, reach: tuple[str, ...]) -> None:
        """Let an endpoint send to what these patterns cover, and tell what it has lost."""
        if endpoint.reach == reach:
            return
        lost = clip(" ".join(one for one in endpoint.reach if one not in reach), REASON_BYTES)
        if lost:
            # What it sent while it might is accepted (D15).
            self._switch.flush(endpoint.id)
        self._registry.set_reach(endpoint, reach)
        if lost and endpoint.addresses:
            log.warning("audit: endpoint %d may not send to %s any more", endpoint.id, lost)
            self._tell_revoked(endpoint, _CHANGED, {"reach": lost})

    # --- when the policy has changed ---

    def review(self, buses: Iterable[Bus]) -> None:
        """Ask again about all that endpoints have by what the master said of a former policy."""
        self._is_due = False
        # What many endpoints of one user have, one of them asks for all.
        same: dict[tuple[str, Question], list[tuple[Endpoint, Question]]] = {}
        for bus in buses:
            for endpoint in bus.endpoints.values():
                who = endpoint.principal or f"uid/{endpoint.credentials.uid}"
                for question in _held_by(endpoint, bus):
                    key = who, question._replace(endpoint=0)
                    same.setdefault(key, []).append((endpoint, question))
        for group in same.values():
            self._tickets.run(self._ask_all_again(group), lambda _: None)

    def receive_stated(self, buses: Iterable[Bus]) -> None:
        """The master is back: ask what could not be asked."""
        if self._is_due:
            self.review(buses)

    def _ask_all_again(self, group: Iterable[tuple[Endpoint, Question]]) -> Steps:
        for endpoint, question in group:
            yield from self._ask_again(endpoint, question)
        return None

    def _ask_again(self, endpoint: Endpoint, question: Question) -> Steps:
        policy = self.policy
        if not self._has(endpoint, question):
            return None
        verdict = None
        while verdict is None:
            try:
                verdict = yield from self._find_out(question)
            except NoSuchEndpoint:
                return None
            except MasterLost:
                self._is_due = True
                return None
            except DeadlineExceeded:
                log.warning("endpoint %d: no word on a changed policy yet", endpoint.id)
        if policy != self.policy or not self._has(endpoint, question):
            # A newer review asks for itself; or what it was about is over.
            return None
        if not verdict.is_allowed:
            self._take(endpoint, question, verdict.reason)
        elif question.address is not None:
            self.set_reach(endpoint, verdict.reach)
        return None

    def _has(self, endpoint: Endpoint, question: Question) -> bool:
        """Tell whether an endpoint has what was asked about."""
        bus = endpoint.bus
        is_here = self._registry.endpoints.get(endpoint.id) is endpoint
        if bus is None or not is_here or bus.path != question.path:
            return False
        if question.action == "monitor":
            return GrantFlags.MONITOR in endpoint.flags
        if question.what is not None:
            return question.what in endpoint.sends
        is_member = bool(endpoint.addresses) and not endpoint.is_master
        return is_member and question.address == bus.master_address

    def receive_refuted(self, question: Question, reason: str) -> None:
        """What was done while the cluster's master was away may not be: it is undone (D16)."""
        endpoint = self._registry.find_endpoint(question.endpoint)
        if endpoint is not None and self._has(endpoint, question):
            self._take(endpoint, question, reason)

    def _take(self, endpoint: Endpoint, question: Question, reason: str) -> None:
        """Take from an endpoint what it has and may not have any more (D15)."""
        text, registry = _denied(reason), self._registry
        log.warning("audit: %s of endpoint %d was taken: %s", question.action, endpoint.id, text)
        if question.action == "monitor":
            self.take_flag(endpoint, GrantFlags.MONITOR, text)
            assert endpoint.bus is not None, "it is on the bus that it monitored"
            where = f"all messages of {escape(endpoint.bus.path)}"
            self._effects.append(Audit(f"endpoint {endpoint.id} no longer sees {where}"))
        elif question.what is None:
            self.evict(endpoint, text)
        else:
            self._switch.flush(endpoint.id)
            registry.forbid_send(endpoint, question.what)
            self._tell_revoked(endpoint, text, {"send": format_what(question.what)})

    def take_flag(self, endpoint: Endpoint, flag: GrantFlags, reason: str) -> None:
        """Take a right from an endpoint that its bus's master had granted, and tell it."""
        self._registry.set_flags(endpoint, endpoint.flags & ~flag)
        self._tell_revoked(endpoint, reason, {"grant": str(flag.name)})

    def _tell_revoked(
        self, endpoint: Endpoint, reason: str, detail: Mapping[str, int | str]
    ) -> None:
        self._registry.announce([endpoint], Notice(Event.REVOKED, (), reason, detail))

    # --- what the switch refuses ---

    def receive_denied(self, number: int, address: bytes) -> None:
        """The switch has refused a message for where it was to go: that is for the audit.

        It tells once of each address. The cluster's master, being asked, writes it down as well.
        """
        endpoint = self._registry.find_endpoint(number)
        if endpoint is None or endpoint.bus is None:
            return
        path, who = endpoint.bus.path, endpoint.principal or f"uid/{endpoint.credentials.uid}"
        text = "audit: endpoint %d (%s) may not send to %s on %s"
        log.warning(text, number, who, format_within(address), escape(path))
        if self._uplink.is_here:
            self._uplink.ask(Question(number, "send", path, address), self._clock())


def _denied(reason: str) -> str:
    return f"the policy of the cluster does not allow it: {reason}"


def _joining(endpoint: Endpoint, bus: Bus) -> Question:
    """Who may send to the master may join; the master may have more to say."""
    return Question(endpoint.id, "send", bus.path, bus.master_address)


def _questions_of(target: Endpoint, changes: Iterable[Command]) -> Iterable[Question]:
    bus = target.bus
    assert bus is not None, "commands are for an endpoint of the bus"
    for change in changes:
        match change:
            # A master does not ask itself whether it may join.
            case OwnedAddr() if not target.is_master:
                yield _joining(target, bus)
            case MulticastSend(_, what):
                yield Question(target.id, "send", bus.path, what=what)
            case Grant(flags) if GrantFlags.MONITOR in flags:
                yield Question(target.id, "monitor", bus.path)
            case _:
                pass


def _held_by(endpoint: Endpoint, bus: Bus) -> Iterable[Question]:
    """Return what an endpoint has that the master was asked about."""
    if endpoint.addresses and not endpoint.is_master:
        yield _joining(endpoint, bus)
    for what in list(endpoint.sends):
        yield Question(endpoint.id, "send", bus.path, what=what)
    if GrantFlags.MONITOR in endpoint.flags:
        yield Question(endpoint.id, "monitor", bus.path)
