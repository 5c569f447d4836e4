"""A cluster in any weather: clients, cuts, deaths and restarts at random, beside a slow model.

After each storm all is healed, and then everything that was accepted was read once and in its
order, or its loss was told; and no table has anything that nobody has.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, ClassVar, Final

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from tests.cluster.society import NAMES, NODES, TOPICS
from tests.cluster.storm import PAIRS, SIZES, Storm
from tests.cluster.town import MASTER
from tests.figures import IS_FULL, note

if TYPE_CHECKING:
    from afbus.proto.terms import Terms

#: With AFBUS_TEST_FULL 500 rounds, in parts that a busy machine gets done in their time.
PARTS: Final = 5 if IS_FULL else 1
ROUNDS: Final = 100 if IS_FULL else 20

picks = st.integers(0, 99)
seeds = st.integers(0, (1 << 32) - 1)
nodes = st.sampled_from(NODES)
pairs = st.sampled_from(PAIRS)
names = st.sampled_from(NAMES)
topics = st.sampled_from(TOPICS)
sizes = st.sampled_from(SIZES)
counts = st.sampled_from([1, 1, 3, 10])
seconds = st.sampled_from([0.05, 0.05, 0.3, 1.0, 3.0, 7.0, 15.0, 130.0])


class _Weather(RuleBasedStateMachine):
    """What happens, and when."""

    #: What all storms came to.
    sums: ClassVar[Counter[str]] = Counter()

    storm: Storm

    @initialize(node=nodes, has_post=st.booleans())
    def begin(self, node: str, has_post: bool) -> None:
        self.storm = Storm(has_post=has_post)
        self.storm.begin(node)

    @rule(node=nodes)
    def bind(self, node: str) -> None:
        self.storm.bind(node)

    @rule(node=nodes, is_small=st.booleans())
    def come(self, node: str, is_small: bool) -> None:
        self.storm.come(node, is_small=is_small)

    @rule(pick=picks, is_killed=st.booleans())
    def leave(self, pick: int, is_killed: bool) -> None:
        self.storm.leave(pick, is_killed=is_killed)

    @rule(pick=picks, name=names, is_given=st.booleans())
    def name(self, pick: int, name: bytes, is_given: bool) -> None:
        self.storm.name(pick, name, is_given=is_given)

    @rule(pick=picks, topic=topics)
    def hear(self, pick: int, topic: Terms) -> None:
        self.storm.hear(pick, topic)

    @rule(pick=picks, topic=topics)
    def unhear(self, pick: int, topic: Terms) -> None:
        self.storm.unhear(pick, topic)

    @rule(pick=picks, dst=st.one_of(names, st.just(MASTER), picks), count=counts, size=sizes)
    def tell(self, pick: int, dst: bytes | int, count: int, size: int) -> None:
        self.storm.tell(pick, dst, count, size)

    @rule(pick=picks, dst=picks)
    def ask(self, pick: int, dst: int) -> None:
        self.storm.ask(pick, dst)

    @rule(pick=picks, topic=topics, count=counts, size=sizes)
    def shout(self, pick: int, topic: Terms, count: int, size: int) -> None:
        self.storm.shout(pick, topic, count, size)

    @rule(pick=picks)
    def sleep(self, pick: int) -> None:
        self.storm.sleep(pick)

    @rule(seed=seeds)
    def bustle(self, seed: int) -> None:
        self.storm.bustle(seed)

    @rule(seed=seeds)
    def squall(self, seed: int) -> None:
        self.storm.squall(seed)

    @rule(pair=pairs)
    def cut(self, pair: tuple[str, str]) -> None:
        self.storm.cut(pair)

    @rule(pair=pairs, is_back=st.booleans())
    def half_cut(self, pair: tuple[str, str], is_back: bool) -> None:
        self.storm.half_cut(pair, is_back=is_back)

    @rule(pair=pairs, delay_s=st.sampled_from([0.0, 0.02, 0.5]), loss=st.sampled_from([0.0, 0.3]))
    def haze(self, pair: tuple[str, str], delay_s: float, loss: float) -> None:
        self.storm.haze(pair, delay_s, loss)

    @rule(pair=pairs)
    def heal(self, pair: tuple[str, str]) -> None:
        self.storm.heal(pair)

    @rule(node=nodes)
    def cut_line(self, node: str) -> None:
        self.storm.cut_line(node)

    @rule(node=nodes)
    def heal_line(self, node: str) -> None:
        self.storm.heal_line(node)

    @rule(node=nodes)
    def cut_post(self, node: str) -> None:
        self.storm.cut_post(node)

    @rule(node=nodes)
    def heal_post(self, node: str) -> None:
        self.storm.heal_post(node)

    @rule(node=nodes)
    def kill_node(self, node: str) -> None:
        self.storm.kill_node(node)

    @rule(node=nodes)
    def start_node(self, node: str) -> None:
        self.storm.start_node(node)

    @rule(node=nodes)
    def restart_agent(self, node: str) -> None:
        self.storm.restart_agent(node)

    @rule()
    def kill_master(self) -> None:
        self.storm.kill_master()

    @rule()
    def start_master(self) -> None:
        self.storm.start_master()

    @rule(duration_s=seconds)
    def wait(self, duration_s: float) -> None:
        self.storm.wait(duration_s)

    @rule()
    def calm(self) -> None:
        self.storm.calm()

    def teardown(self) -> None:
        try:
            self.storm.calm()
            self.sums.update(self.storm.sums)
        finally:
            self.storm.close()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_case23_case25_d11_d21_any_storm(part: int) -> None:
    """Order, once, nothing lost without a word, and no ghosts in any table.

    A share of the rounds, the same each time; in full they are others each time.
    """
    sums = _Weather.sums
    sums.clear()
    while sums["rounds of cut and heal"] < ROUNDS:
        run_state_machine_as_test(
            _Weather,
            settings=settings(
                max_examples=30,
                stateful_step_count=40,
                derandomize=not IS_FULL,
                # To shrink takes longer than a test may: threads of switches are in it.
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    note(f"part {part + 1}: " + ", ".join(f"{sums[what]:,} {what}" for what in sums))
