"""`afbus node` and `node join` as real processes of a cluster: exit codes, what is printed."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from aioquic.quic.events import ConnectionTerminated
from click.testing import CliRunner
from tests.link.authority import Signer, Wish
from tests.link.stranger import Stranger
from tests.master.world import NOW_UTC, World
from tests.node.test_membership import join as join_at_now_utc

from afbus.cli.main import afbus
from afbus.link.identity import Identity, Role
from afbus.node import membership
from afbus.proto.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Desk, Done, Running

    from afbus.link.credentials import Credentials

pytestmark = pytest.mark.cluster

DONE, REFUSED, USAGE = 0, 1, 2
#: The longest that anything here may take, on a machine that is busy.
LIMIT_S = 60.0
POLICY = """
[[rule]]
name = "demo"
who = ["uid/*@*"]
bus = ["/demo"]
bind = true
own = ["demo.**"]
send = ["**", "topic:**"]
receive = ["topic:**"]
"""


class Cluster:
    """A master, and folders of nodes."""

    def __init__(self, desk: Desk, folder: Path) -> None:
        self.desk, self.folder = desk, folder
        desk.environment["AFBUS_MASTER"] = str(folder / "master")
        assert desk.do("master", "init", "demo").code == DONE
        (folder / "master" / "policy.toml").write_text(POLICY)
        running = desk.start("master", "run", "--listen", "127.0.0.1:0", "--json")
        self.place = f"127.0.0.1:{running.object()['port']}"

    def write_token(self, name: str) -> Path:
        """Return the file of a token for a node."""
        file = self.folder / f"{name}.token"
        file.write_text(self.desk.do("token", "--name", name).out)
        return file

    def join(self, name: str, *more: str) -> Done:
        """Make a node, in the folder of its name."""
        file = self.folder / f"{name}.token"
        options = ("--token-file", str(file), "--name", name, "--state", str(self.folder / name))
        return self.desk.do("node", "join", *options, *more, self.place)

    def start(self, name: str, *more: str) -> Running:
        """Start the agent of a node, and let the desk have it as the agent of this host."""
        door = self.folder / f"{name}.sock"
        self.desk.environment["AFBUS_NODE"] = str(door)
        listen = ("--listen", "127.0.0.1:0")
        made = self.desk.start("node", "--cluster", str(self.folder / name), *listen, *more)
        assert str(door) in made.line()
        return made

    def go_to(self, name: str) -> None:
        """Let the desk be at another node."""
        self.desk.environment["AFBUS_NODE"] = str(self.folder / f"{name}.sock")

    def await_bus(self, path: str) -> None:
        """Wait until the node knows a bus."""
        end = time.monotonic() + LIMIT_S
        while self.desk.do("list", "buses", path).code != DONE:
            assert time.monotonic() < end, "the bus does not come"


class Knock(Stranger):
    """Somebody at the port of a node; `ended` tells of the end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, address: Any, *, credentials: Credentials | None
    ) -> None:
        self.ended = asyncio.Event()
        super().__init__(loop, address, credentials=credentials)

    def transmit(self) -> None:
        """Send what there is, and see whether this is the end."""
        super().transmit()
        if self.has(ConnectionTerminated)():
            self.ended.set()


@pytest.fixture
def cluster(bare_desk: Desk, tmp_path: Path) -> Cluster:
    """Return a cluster without nodes."""
    return Cluster(bare_desk, tmp_path)


def test_a_host_joins_once(cluster: Cluster) -> None:
    """A second time is an error, but not where it is only to be so, and then needs no token."""
    file = cluster.write_token("a")
    done = cluster.join("a", "--json")
    made = json.loads(done.out)
    assert (made["cluster"], made["node"], made["is_new"]) == ("demo", "a", True)
    again = cluster.join("a")
    assert (again.code, "is a node already; --again" in again.complaint) == (USAGE, True)
    file.unlink()
    known = cluster.join("a", "--if-needed", "--json")
    assert (known.code, json.loads(known.out)) == (DONE, {**made, "is_new": False})
    assert "since before" in cluster.join("a", "--if-needed").out
    options = ("--if-needed", "--token-file", str(file), "--state", str(cluster.folder / "a"))
    other = cluster.desk.do("node", "join", *options, "--name", "b", cluster.place)
    assert (other.code, "is node a already, and not b" in other.complaint) == (USAGE, True)
    for text, why in (("", "is empty"), ("afbus-join:1:2:3", "this is no join token")):
        (cluster.folder / "b.token").write_text(text)
        wrong = cluster.join("b")
        assert (wrong.code, f"b.token: {why}" in wrong.complaint) == (USAGE, True)
    (cluster.folder / "b.token").unlink()
    missing = cluster.join("b", "--if-needed")
    assert (missing.code, "b.token: cannot be read" in missing.complaint) == (USAGE, True)


@pytest.mark.parametrize(("hours", "is_known"), [(23, True), (25, False)])
def test_a_certificate_that_is_over_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int, is_known: bool
) -> None:
    """A host that was off for too long joins again, where that is needed: it asks for a token."""
    join_at_now_utc(World(), tmp_path / "a")
    at = datetime.fromtimestamp(NOW_UTC, UTC) + timedelta(hours=hours)
    monkeypatch.setattr(membership, "utc_now", lambda: at)
    options = ("--if-needed", "--state", str(tmp_path / "a"), "--token-file", "/nowhere")
    done = CliRunner().invoke(afbus, ["node", "join", *options, "127.0.0.1:1"])
    if is_known:
        assert (done.exit_code, "since before" in done.output) == (DONE, True)
    else:
        assert isinstance(done.exception, ConfigError)
        assert "/nowhere" in str(done.exception)


@pytest.mark.parametrize("master", [":4450", "[::1"])
def test_a_place_that_is_none_is_wrong_usage(bare_desk: Desk, master: str) -> None:
    """Before anything is read or asked."""
    done = bare_desk.do("node", "join", "--token-file", "/nowhere", master)
    assert (done.code, "'MASTER...'" in done.complaint) == (USAGE, True)


def test_what_keeps_a_node_from_listening(cluster: Cluster) -> None:
    """What another process has is refused, and may be free later; what cannot be is wrong usage."""
    cluster.write_token("a")
    assert cluster.join("a").code == DONE
    node = ("node", "--cluster", str(cluster.folder / "a"), "--listen")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        done = cluster.desk.do(*node, f"127.0.0.1:{port}")
    assert (done.code, done.complaint) == (
        REFUSED,
        f"afbus: cannot bind 127.0.0.1 port {port}: Address already in use\n",
    )
    done = cluster.desk.do(*node, "192.0.2.1:4451")
    assert (done.code, "afbus: listen: cannot bind" in done.complaint) == (USAGE, True)
    for option, place in (("--listen", "desk.example:1"), ("--place", ":4451"), ("--place", "x y")):
        done = cluster.desk.do(*node, "127.0.0.1:0", option, place)
        assert (done.code, f"'{option}'" in done.complaint) == (USAGE, True)
    done = cluster.desk.do("node", "--listen", "127.0.0.1:0")
    assert (done.code, "--cluster" in done.complaint) == (USAGE, True)


@pytest.mark.parametrize("carrier", ["native", "aioquic"])
def test_case33_a_node_tells_of_whom_it_has_refused(cluster: Cluster, carrier: str) -> None:
    """From where, and by which rule, in its log; whoever has no certificate too."""
    cluster.write_token("a")
    assert cluster.join("a").code == DONE
    settings = cluster.folder / "node.toml"
    settings.write_text(f'carrier = "{carrier}"\n')
    agent = cluster.start("a", "--config", str(settings))
    [status] = cluster.desk.do("status", "--json").objects()
    host, port = status["cluster"]["listen"].split(":")

    async def knock(credentials: Credentials | None) -> None:
        loop = asyncio.get_running_loop()
        knock = Knock(loop, (host, int(port)), credentials=credentials)
        async with asyncio.timeout(LIMIT_S):
            await knock.ended.wait()
        knock.close()

    now, hour = datetime.now(UTC), timedelta(hours=1)
    of_others = Signer.root().issue(Identity("demo", Role.NODE, "b"), Wish(now - hour, now + hour))
    for credentials, rule in ((None, "no-certificate"), (of_others, "certificate-untrusted")):
        asyncio.run(knock(credentials))
        while not (line := agent.complaint()).startswith("WARNING afbus.node: audit: refused"):
            assert line, agent.rest()
        assert f": {rule}: " in line
        assert f" {host} port " in line


def test_the_journal_lies_where_it_is_wanted(bare_desk: Desk, tmp_path: Path) -> None:
    """And has one agent, also if two doors are meant to share it."""
    settings = tmp_path / "node.toml"
    journal = tmp_path / "state" / "node.journal"
    settings.write_text(f'journal = "{journal}"\n')
    agent = bare_desk.start("node", "--config", str(settings))
    assert str(bare_desk.door) in agent.line()
    assert journal.exists()
    assert not list(tmp_path.glob("*.journal"))
    other = bare_desk.do("node", "--config", str(settings), "--door", str(tmp_path / "other.sock"))
    assert (other.code, other.complaint) == (
        REFUSED,
        f"afbus: another agent (pid {agent.pid}) writes {journal}\n",
    )
    settings.write_text('journal = "relative"\n')
    done = bare_desk.do("node", "--config", str(settings))
    assert (done.code, "journal" in done.complaint) == (USAGE, True)


def test_nodes_that_do_not_reach_each_other_carry_large_bodies(cluster: Cluster) -> None:
    """D14: by way of the master, whole; lists show the bus on both, each row with its node."""
    desk = cluster.desk
    for name in ("a", "b"):
        cluster.write_token(name)
        assert cluster.join(name).code == DONE
        # Nobody is there, so whoever looks for them there finds nobody.
        cluster.start(name, "--place", "127.0.0.1:9")
    cluster.go_to("a")
    bus = desk.start("bus", "create", "/demo", "--name", "demo.master", "--cluster")
    assert "is there" in bus.line()
    reader = desk.start("join", "/demo", "--name", "demo.reader", "--json")
    assert reader.object()["kind"] == "joined"
    cluster.go_to("b")
    cluster.await_bus("/demo")
    text = os.urandom(300_000).hex()
    sent = desk.do("send", "/demo", "demo.reader", "-", "--deadline", "60", stdin=text.encode())
    assert (sent.code, sent.complaint) == (DONE, "")
    while (got := reader.object())["kind"] != "message":
        pass
    assert got["body"] == text
    [status] = desk.do("status", "--json").objects()
    assert [peer["link"] for peer in status["cluster"]["peers"]] == ["relayed"]
    rows = desk.do("list", "addresses", "/demo", "--json").objects()
    assert {(row["node"], row["address"]) for row in rows} == {
        ("a", "demo.master"),
        ("a", "demo.reader"),
    }
