"""`afbus master`, `token`, `revoke` and `policy` as real processes: exit codes, what is printed."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.cli.conftest import Desk, Running

pytestmark = pytest.mark.cluster

DONE, REFUSED, USAGE, NO_AGENT = 0, 1, 2, 3


@pytest.fixture
def state(bare_desk: Desk, tmp_path: Path) -> Path:
    """The state of a new cluster, which the commands find by themselves."""
    path = tmp_path / "state"
    bare_desk.environment["AFBUS_MASTER"] = str(path)
    assert bare_desk.do("master", "init", "demo").code == DONE
    return path


@pytest.fixture
def master(bare_desk: Desk, state: Path) -> Iterator[Running]:
    """The master of that cluster."""
    running = bare_desk.start("master", "run", "--listen", "127.0.0.1:0", "--verbose")
    assert f"(pid {running.pid}) at 127.0.0.1:" in running.line()
    yield running
    assert (state / "journal.db").exists()


def test_a_cluster_is_made_once(bare_desk: Desk, tmp_path: Path) -> None:
    """With the root's key where it is wanted; a second time is an error that names the folder."""
    path, key = tmp_path / "state", tmp_path / "root.key"
    done = bare_desk.do("master", "init", "--state", str(path), "--root-key", str(key), "demo")
    assert (done.code, done.complaint) == (DONE, "")
    assert str(key) in done.out
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    again = bare_desk.do("master", "init", "--state", str(path), "demo")
    assert (again.code, again.complaint) == (
        USAGE,
        f"afbus: {path}: is not empty; a cluster is made once\n",
    )
    done = bare_desk.do("master", "init", "--state", str(tmp_path / "x"), "--json", "a.b")
    assert done.objects() == [
        {
            "cluster": "a.b",
            "state": str(tmp_path / "x"),
            "root_key": str(tmp_path / "x" / "root.key"),
        }
    ]
    done = bare_desk.do("master", "init", "--state", str(tmp_path / "y"), "a/b")
    assert done.code == USAGE
    assert "'a/b'" in done.complaint


def test_a_cluster_that_is_there_may_be_enough(bare_desk: Desk, tmp_path: Path) -> None:
    """With --if-needed a second time is no error; another cluster in the folder is one."""
    init = ("master", "init", "--if-needed", "--state", str(tmp_path / "state"))
    assert "is made" in bare_desk.do(*init, "demo").out
    before = (tmp_path / "state" / "root.pem").read_bytes()
    again = bare_desk.do(*init, "demo")
    assert (again.code, again.out) == (
        DONE,
        f"cluster demo was made before, in {tmp_path / 'state'}\n",
    )
    assert (tmp_path / "state" / "root.pem").read_bytes() == before
    other = bare_desk.do(*init, "other")
    assert (other.code, "is the state of the cluster demo" in other.complaint) == (USAGE, True)


def test_a_master_runs_until_it_is_ended(bare_desk: Desk, state: Path) -> None:
    """SIGTERM and Ctrl-C are its ordinary end; its door goes with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        running = bare_desk.start("master", "run", "--listen", "127.0.0.1:0", "--json")
        told = running.object()
        assert (told["host"], told["state"]) == ("127.0.0.1", str(state))
        assert (state / "master.sock").exists()
        assert stat.S_IMODE((state / "master.sock").stat().st_mode) == 0o600
        assert running.end(number) == (DONE, "", "")
        assert not (state / "master.sock").exists()


def test_what_keeps_a_master_from_running(bare_desk: Desk, state: Path, master: Running) -> None:
    """Another one, no state, a wrong policy, a wrong address: told in one line."""
    done = bare_desk.do("master", "run", "--listen", "127.0.0.1:0")
    assert (done.code, done.complaint) == (
        REFUSED,
        f"afbus: a master runs with the state in {state}\n",
    )
    assert master.end().code == DONE
    done = bare_desk.do("master", "run", "--state", str(state / "none"))
    assert (done.code, "afbus master init" in done.complaint) == (USAGE, True)
    policy = state.with_name("policy.toml")
    policy.write_text("[[rule]]\nname = 'a'\nwho = ['root']\n")
    done = bare_desk.do("master", "run", "--policy", str(policy))
    assert done.code == USAGE
    assert done.complaint.startswith(f"afbus: {policy}, line 3: rule 1, who: ")
    for address in ("desk.example:4450", ""):
        done = bare_desk.do("master", "run", "--listen", address)
        assert (done.code, "'--listen'" in done.complaint) == (USAGE, True)
    done = bare_desk.do("master", "run", "--listen", "192.0.2.1:4450")
    assert (done.code, "--listen" in done.complaint) == (USAGE, True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        done = bare_desk.do("master", "run", "--listen", f"127.0.0.1:{port}")
    assert (done.code, done.complaint) == (
        REFUSED,
        f"afbus: cannot bind 127.0.0.1 port {port}: Address already in use\n",
    )
    (state / "journal.db").write_bytes(b"garbage" * 100)
    done = bare_desk.do("master", "run", "--listen", "127.0.0.1:0")
    assert (done.code, "journal.db" in done.complaint) == (REFUSED, True)
    assert "Traceback" not in done.complaint


def test_tokens(bare_desk: Desk, master: Running) -> None:
    """Standard output has the token alone, so that it can go to a file."""
    done = bare_desk.do("token")
    assert done.code == DONE
    assert done.out.startswith("afbus-join:")
    assert done.out.count("\n") == 1
    assert "any new node" in done.complaint
    [made] = bare_desk.do("token", "--name", "a", "--life", "60", "--ephemeral", "--json").objects()
    assert made["node"] == "a"
    assert made["token"].startswith("afbus-join:")
    assert datetime.fromisoformat(made["until"]) > datetime.now(UTC)
    for name in ("a/b", ""):
        done = bare_desk.do("token", "--name", name)
        assert (done.code, f"name '{name}'" in done.complaint) == (USAGE, True)
    assert bare_desk.do("token", "--life", "1").code == REFUSED
    assert master.pid


def test_without_a_master(bare_desk: Desk, state: Path) -> None:
    """What needs one says so, with an exit code of its own; what does not, works."""
    for command in (["token"], ["revoke", "node/a"], ["master", "status"], ["master", "nodes"]):
        done = bare_desk.do(*command)
        assert (done.code, done.out) == (NO_AGENT, "")
        assert f"no master runs with the state in {state}" in done.complaint
    done = bare_desk.do("master", "audit")
    assert (done.code, done.out) == (REFUSED, "")
    assert bare_desk.do("token", "--state", str(state / "none")).code == USAGE


def test_status_nodes_and_audit(bare_desk: Desk, state: Path, master: Running) -> None:
    """What the master sees, in lines and as objects; the audit also when it does not run."""
    bare_desk.do("token", "--name", "a")
    done = bare_desk.do("master", "status")
    assert "cluster        demo\n" in done.out
    [status] = bare_desk.do("master", "status", "--json").objects()
    assert (status["nodes"], status["tokens"]) == (0, 1)
    done = bare_desk.do("master", "nodes")
    assert (done.code, done.out, done.complaint) == (DONE, "", "none\n")
    assert master.end().code == DONE
    [entry] = bare_desk.do("master", "audit", "--json").objects()
    assert (entry["actor"], entry["action"], entry["subject"]) == ("operator", "token", "node/a")
    assert entry["is_done"] is True
    assert datetime.fromisoformat(entry["time"]).tzinfo is UTC
    done = bare_desk.do("master", "audit", "--after", "1")
    assert (done.code, done.out, done.complaint) == (DONE, "", "none\n")
    done = bare_desk.do("master", "audit")
    assert "operator: token node/a: token " in done.out
    assert state.exists()


def test_principals_get_certificates(bare_desk: Desk, tmp_path: Path, master: Running) -> None:
    """Key, chain and root, for them alone; and they lose them."""
    out = tmp_path / "alice"
    done = bare_desk.do("master", "issue", "alice", "--out", str(out))
    assert done.code == DONE
    assert done.out.startswith("principal/alice has a certificate until ")
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()}
    assert files == dict.fromkeys(["alice.key", "alice.pem", "root.pem"], 0o600)
    assert (out / "alice.pem").read_text().count("BEGIN CERTIFICATE") == 2
    again = bare_desk.do("master", "issue", "alice", "--out", str(out))
    assert (again.code, "alice.key" in again.complaint) == (USAGE, True)
    assert bare_desk.do("master", "issue", "a/b", "--out", str(out)).code == USAGE
    done = bare_desk.do("revoke", "principal/alice", "--reason", "left")
    assert done.code == DONE
    # Nothing was issued that could not have been written.
    assert done.out.count(",") == 0
    done = bare_desk.do("revoke", "node/nobody")
    assert (done.code, "node/nobody" in done.complaint) == (REFUSED, True)
    for subject in ("alice", "node/a b", "serial/xyz"):
        done = bare_desk.do("revoke", subject)
        assert (done.code, "'SUBJECT'" in done.complaint) == (USAGE, True)
    [made] = bare_desk.do("revoke", "serial/abc", "--json").objects()
    assert made == {"subject": "serial/abc", "serials": ["abc"]}
    assert master.pid


def test_the_policy_is_read_again(bare_desk: Desk, state: Path, master: Running) -> None:
    """On SIGHUP; one that is wrong is told with file, line and key, and not followed."""
    [before] = bare_desk.do("master", "status", "--json").objects()
    policy = state / "policy.toml"
    good = (
        policy.read_text() + '[[rule]]\nname = "r"\nwho = ["uid/*@*"]\nbus = ["/b"]\nbind = true\n'
    )
    policy.write_text("[[rule]]\ncolour = 1\n")
    os.kill(master.pid, signal.SIGHUP)
    while "not followed" not in (line := master.complaint()):
        assert line
    assert f"{policy}, line 2: rule 1, colour: " in line
    policy.write_text(good)
    os.kill(master.pid, signal.SIGHUP)
    while "policy added r: done" not in (line := master.complaint()):
        assert line
    [after] = bare_desk.do("master", "status", "--json").objects()
    assert after["policy"] == before["policy"] + 1
    entries = bare_desk.do("master", "audit", "--json").objects()
    assert [one["is_done"] for one in entries if one["action"] == "policy"] == [False, True]


def test_the_issuing_certificate_is_renewed(bare_desk: Desk, tmp_path: Path) -> None:
    """With the key of the root, and no other."""
    path, key = tmp_path / "state", tmp_path / "root.key"
    bare_desk.do("master", "init", "--state", str(path), "--root-key", str(key), "demo")
    done = bare_desk.do("master", "renew", "--state", str(path))
    assert (done.code, "root.key" in done.complaint) == (USAGE, True)
    done = bare_desk.do("master", "renew", "--state", str(path), "--root-key", str(key))
    assert done.code == DONE
    assert done.out.startswith("the issuing certificate is good until ")


POLICY = """
[[rule]]
name = "counters"
who = ["principal/collector-*", "uid/1000@node-a"]
bus = ["/counters"]
own = ["org.example.**"]
receive = ["topic:counters.**"]
bind = true
"""


def test_policies_are_checked_and_explained(bare_desk: Desk, tmp_path: Path) -> None:
    """Without a master: what is wrong where, and what a policy means for whom."""
    file = tmp_path / "policy.toml"
    file.write_text(POLICY)
    done = bare_desk.do("policy", "check", str(file))
    assert (done.code, done.out) == (DONE, f"{file}: 1 rule: counters\n")
    [made] = bare_desk.do("policy", "check", str(file), "--json").objects()
    assert made["rules"] == ["counters"]
    for who in ("root", "uid/0"):
        done = bare_desk.do("policy", "explain", str(file), who, "bind", "/counters")
        assert (done.code, "'WHO'" in done.complaint) == (USAGE, True)
    who = "principal/collector-1"
    for args, code in (
        (("bind", "/counters"), DONE),
        (("bind", "/other"), REFUSED),
        (("own", "/counters", "org.example.a"), DONE),
        (("own", "/counters", "com.example"), REFUSED),
        (("receive", "/counters", "topic:counters.cpu host=a"), DONE),
        (("receive", "/counters", "topic:"), REFUSED),
        (("own", "/counters"), USAGE),
        (("bind", "/counters", "x"), USAGE),
        (("fly", "/counters"), USAGE),
    ):
        done = bare_desk.do("policy", "explain", str(file), who, *args)
        assert done.code == code, (args, done)
    done = bare_desk.do("policy", "explain", str(file), who, "bind", "/x", "--json")
    assert done.code == REFUSED
    assert json.loads(done.out)["is_allowed"] is False
    file.write_text(POLICY + "colour = 1\n")
    done = bare_desk.do("policy", "check", str(file))
    assert (done.code, done.out) == (USAGE, "")
    assert done.complaint.startswith(f"afbus: {file}, line 9: rule 1, colour: is not known")
    file.write_text("")
    assert "nobody may do anything" in bare_desk.do("policy", "check", str(file)).out


@pytest.mark.parametrize(
    "command",
    [
        ["master"],
        ["master", "init"],
        ["master", "run"],
        ["master", "status"],
        ["master", "nodes"],
        ["master", "audit"],
        ["master", "issue"],
        ["master", "renew"],
        ["token"],
        ["revoke"],
        ["policy"],
        ["policy", "check"],
        ["policy", "explain"],
    ],
    ids=" ".join,
)
def test_each_command_explains_itself(bare_desk: Desk, command: list[str]) -> None:
    """With examples."""
    done = bare_desk.do(*command, "--help")
    assert done.code == DONE
    assert "Examples:\n" in done.out
