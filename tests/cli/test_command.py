"""The command end to end: real processes, exit codes, what is printed."""

from __future__ import annotations

import base64
import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Desk, Running

pytestmark = pytest.mark.cluster

DONE, REFUSED, USAGE, NO_AGENT, DEADLINE, INTERRUPTED, NO_READER = 0, 1, 2, 3, 4, 130, 141


# --- the agent ---


def test_agent_says_where_it_is_and_ends_in_good_order(bare_desk: Desk) -> None:
    """One line says where the door is; SIGTERM and Ctrl-C end it, and nothing is left behind."""
    for number in (signal.SIGTERM, signal.SIGINT):
        agent = bare_desk.start("node")
        assert agent.line() == (
            f"afbus agent (pid {agent.pid}) at {bare_desk.door}; a client finds it by itself"
        )
        assert agent.end(number) == (DONE, "", "")
        assert list(bare_desk.door.parent.iterdir()) == []


def test_agent_says_how_clients_find_another_door(bare_desk: Desk, tmp_path: Path) -> None:
    """Where the door is not the usual one, the line says what to set."""
    other = tmp_path / "other" / "door"
    agent = bare_desk.start("node", "--door", str(other))
    assert agent.line().endswith(f"at {other}; a client finds it with AFBUS_NODE={other}")
    bare_desk.environment["AFBUS_NODE"] = str(other)
    assert bare_desk.do("status").code == DONE


def test_agent_takes_settings(bare_desk: Desk, tmp_path: Path) -> None:
    """A file sets the door and the name of the node; --door counts more."""
    settings = tmp_path / "node.toml"
    settings.write_text(f'door = "{tmp_path / "a"}"\nnode = "desk"\n')
    agent = bare_desk.start("node", "--config", str(settings))
    assert f"AFBUS_NODE={tmp_path / 'a'}" in agent.line()
    agent.end()
    agent = bare_desk.start("node", "--config", str(settings), "--door", str(bare_desk.door))
    agent.line()
    assert bare_desk.do("status", "--json").objects()[0]["node"] == "desk"


@pytest.mark.parametrize(
    ("text", "key"),
    [("doors = 1", "doors"), ("mode = 438", "mode"), ("quota_fds = -1", "quota_fds")],
)
def test_wrong_settings_name_file_and_key(
    bare_desk: Desk, tmp_path: Path, text: str, key: str
) -> None:
    """A wrong file of settings is an error of usage that names file and key."""
    settings = tmp_path / "node.toml"
    settings.write_text(text)
    code, out, complaint = bare_desk.do("node", "--config", str(settings))
    assert (code, out) == (USAGE, "")
    assert complaint.startswith(f"afbus: {settings}: {key}: ")
    assert "Traceback" not in complaint


def test_second_agent_is_refused(desk: Desk, agent: Running) -> None:
    """Where an agent is, another one is refused, and the first is named."""
    code, _, complaint = desk.do("node")
    assert code == REFUSED
    assert f"pid {agent.pid}" in complaint


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("list", "buses"),
        ("bus", "create", "/demo"),
        ("join", "/demo"),
        ("send", "/demo", "1.1", "x"),
        ("publish", "/demo", "topic", "x"),
        ("listen", "/demo"),
        ("request", "/demo", "1.1", "x"),
        ("serve", "/demo", "name", "--echo"),
        ("monitor", "/demo"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_agent_is_said_with_what_to_do(bare_desk: Desk, arguments: tuple[str, ...]) -> None:
    """Without an agent each command says which door it tried, and how to start an agent."""
    code, out, complaint = bare_desk.do(*arguments)
    assert (code, out) == (NO_AGENT, "")
    assert complaint.startswith(f"afbus: no agent at {bare_desk.door} ")
    assert "`afbus node` starts an agent" in complaint
    assert complaint.count("\n") == 1


def test_status_for_people_and_programs(desk: Desk, agent: Running) -> None:
    """The agent says who it is: a line for each fact, or one JSON object."""
    lines = dict(line.split(maxsplit=1) for line in desk.do("status").out.splitlines())
    (values,) = desk.do("status", "--json").objects()
    assert lines.keys() == values.keys()
    assert lines["pid"] == str(values["pid"]) == str(agent.pid)


# --- a bus ---


def test_bus_says_who_comes_and_goes(desk: Desk) -> None:
    """The master prints who joins, leaves and is killed; it ends in good order."""
    master = desk.start("bus", "create", "/demo", "--name", "demo.master", "--width", "1024")
    assert master.line() == "bus /demo is there; its master is /demo:demo.master"
    (row,) = desk.do("list", "buses", "--json").objects()
    assert (row["path"], row["master"], row["width"]) == ("/demo", "demo.master", 1024)

    member = desk.start("join", "/demo", "--name", "demo.member")
    assert member.line() == "joined as /demo:1.1 and /demo:demo.member"
    joined = master.notice("joined")
    assert " 1.1 " in joined
    assert f" pid={member.pid} " in joined
    other = desk.start("join", "/demo", "--json")
    assert other.object() == {"kind": "joined", "addresses": ["/demo:1.2"]}
    assert " 1.2 " in master.notice("joined")

    assert other.end(signal.SIGINT).code == INTERRUPTED
    assert " 1.2 (it closed) " in master.notice("left")
    assert " 1.2 (it closed) " in member.notice("left")
    member.end(signal.SIGKILL)
    assert " 1.1 demo.member (its process ended) " in master.notice("killed")
    assert master.end().code == DONE
    assert desk.do("list", "buses").out == ""


def test_d7_master_prints_what_is_for_nobody(desk: Desk) -> None:
    """Messages to a name that nobody owns are printed by the master, which refuses requests."""
    master = desk.start("bus", "create", "/demo")
    master.line()
    assert desk.do("send", "/demo", "demo.nobody", "hello") == (DONE, "", "")
    assert master.message() == "1.1 to demo.nobody: hello"
    code, _, complaint = desk.do("request", "/demo", "demo.nobody", "hello?")
    assert (code, complaint) == (REFUSED, "afbus: nobody owns /demo:demo.nobody\n")
    assert master.message() == "1.2 to demo.nobody (expects a reply): hello?"
    code, _, complaint = desk.do("request", "/demo", "master", "hello?")
    assert (code, complaint) == (REFUSED, "afbus: the master does not understand this\n")
    assert master.end().code == DONE


@pytest.mark.usefixtures("bus")
def test_second_bus_is_refused(desk: Desk) -> None:
    """The bus of a path is there once."""
    code, out, complaint = desk.do("bus", "create", "/demo")
    assert (code, out) == (REFUSED, "")
    assert complaint.startswith("afbus: /demo is bound")


@pytest.mark.usefixtures("bus")
def test_name_that_is_taken_is_refused(desk: Desk) -> None:
    """Joining with a name that another one owns is refused, and says which name."""
    member = desk.start("join", "/demo", "--name", "demo.one")
    member.line()
    code, _, complaint = desk.do("listen", "/demo", "--name", "demo.one")
    assert code == REFUSED
    assert "demo.one" in complaint


def test_unknown_bus_is_refused(desk: Desk) -> None:
    """A bus that is not there is an error that names it."""
    code, _, complaint = desk.do("send", "/nowhere", "1.1", "x")
    assert code == REFUSED
    assert "/nowhere" in complaint


# --- messages ---


@pytest.mark.usefixtures("bus")
def test_send_and_listen(desk: Desk) -> None:
    """What is sent to a name is printed by its owner: text, bytes from a pipe, a JSON object."""
    listener = desk.start("listen", "/demo", "--name", "demo.log", "--count", "2")
    assert listener.complaint() == "listening as /demo:1.1 and /demo:demo.log"
    assert desk.do("send", "/demo", "demo.log", "hello") == (DONE, "", "")
    assert listener.line() == "1.2 to demo.log: hello"
    desk.do("send", "/demo", "1.1", stdin=b"\x1b[2J\xff\n")
    assert listener.line() == r"1.3 to 1.1: \x1b[2J\xff\n"
    assert listener.rest().code == DONE

    listener = desk.start("listen", "/demo", "--json")
    listener.complaint()
    desk.do("send", "/demo", "1.4", "grüße")
    message = listener.object()
    assert (message["kind"], message["body"]) == ("message", "grüße")
    assert (message["source"], message["destination"]) == ("/demo:1.5", "/demo:1.4")
    assert (message["uid"], message["sequence"], message["copy"]) == (os.getuid(), 2, False)
    desk.do("send", "/demo", "1.4", "-", stdin=b"\xff\0")
    message = listener.object()
    assert "body" not in message
    assert base64.b64decode(message["body_base64"]) == b"\xff\0"
    assert listener.end().code == DONE


@pytest.mark.usefixtures("bus")
def test_publish_and_listen(desk: Desk) -> None:
    """A subscription hears what has all of its terms, and nothing else."""
    listener = desk.start("listen", "/demo", "sensors.cpu", "host=a", "--count", "1")
    listener.complaint()
    assert desk.do("publish", "/demo", "sensors.cpu", "no host").code == DONE
    assert desk.do("publish", "/demo", "sensors.cpu.0 host=a unit=s", "42").code == DONE
    assert listener.rest() == (DONE, "1.3 [sensors.cpu.0 host=a unit=s]: 42\n", "")


@pytest.mark.usefixtures("bus")
def test_listen_ends_at_its_timeout(desk: Desk) -> None:
    """A timeout is the end of listening; where a count was wanted it is a passed deadline."""
    assert desk.do("listen", "/demo", "--timeout", "0.01").code == DONE
    code, out, complaint = desk.do("listen", "/demo", "--timeout", "0.01", "--count", "1")
    assert (code, out) == (DEADLINE, "")
    assert complaint.endswith("afbus: 1 messages: not within 0.01 s\n")


@pytest.mark.usefixtures("bus")
def test_request_and_serve(desk: Desk) -> None:
    """Requests are answered by an echo or by a program; a program that fails is a refusal."""
    for name, *how in (
        ("demo.echo", "--echo"),
        ("demo.sort", "--exec", "sort -r"),
        ("demo.false", "--exec", "sh -c 'echo too late >&2; exit 3'"),
        ("demo.none", "--exec", "/nowhere/program"),
    ):
        service = desk.start("serve", "/demo", name, *how)
        assert service.complaint().endswith(f" and /demo:{name}")
    assert desk.do("request", "/demo", "demo.echo", "hello") == (DONE, "hello\n", "")
    assert desk.do("request", "/demo", "demo.sort", stdin=b"a\nb\n").out == "b\na\n\n"
    (reply,) = desk.do("request", "/demo", "demo.echo", "x", "--json").objects()
    assert (reply["body"], reply["source"]) == ("x", "/demo:demo.echo")
    code, out, complaint = desk.do("request", "/demo", "demo.false", "x")
    assert (code, out) == (REFUSED, "")
    assert complaint == "afbus: sh ended with 3: too late\n"
    code, _, complaint = desk.do("request", "/demo", "demo.none", "x")
    assert (code, complaint) == (REFUSED, "afbus: /nowhere/program: No such file or directory\n")


@pytest.mark.usefixtures("bus")
def test_request_that_nobody_answers(desk: Desk) -> None:
    """Nobody there is a refusal; somebody who does not answer is a passed deadline."""
    code, _, complaint = desk.do("request", "/demo", "demo.nobody", "x")
    assert code == REFUSED
    assert "demo.nobody" in complaint
    listener = desk.start("listen", "/demo", "--name", "demo.silent")
    listener.complaint()
    code, _, complaint = desk.do("request", "/demo", "demo.silent", "x", "--deadline", "0.05")
    assert (code, complaint.count("\n")) == (DEADLINE, 1)
    assert "demo.silent" in complaint
    assert listener.line().endswith("to demo.silent (expects a reply): x")


@pytest.mark.usefixtures("bus")
def test_d12_gap_is_printed_and_counts_exactly(desk: Desk) -> None:
    """A listener that stood still prints a gap that accounts for all that it missed."""
    listener = desk.start("listen", "/demo", "big", "--json")
    listener.complaint()
    os.kill(listener.pid, signal.SIGSTOP)
    flood = bytes(60_000)
    count = 40
    for _ in range(count):
        assert desk.do("publish", "/demo", "big", stdin=flood).code == DONE
    os.kill(listener.pid, signal.SIGCONT)
    assert desk.do("publish", "/demo", "big.last", "end").code == DONE
    heard = missed = 0
    while True:
        item = listener.object()
        if item["kind"] == "gap":
            missed += item["count"]
        elif item["terms"] == "big.last":
            break
        else:
            heard += 1
    assert missed > 0
    assert heard + missed == count


def test_d19_monitor_needs_a_grant(desk: Desk) -> None:
    """Copies of everything, and hearing everything, are for buses whose master allows it."""
    strict = desk.start("bus", "create", "/strict")
    strict.line()
    for arguments in (("monitor", "/strict"), ("listen", "/strict", "--all")):
        code, out, complaint = desk.do(*arguments)
        assert (code, out) == (REFUSED, "")
        # One line: nothing has begun.
        assert complaint.startswith("afbus: the master does not allow ")
        assert complaint.endswith(" (see --allow-monitors)\n")

    master = desk.start("bus", "create", "/open", "--allow-monitors")
    master.line()
    everything = desk.start("listen", "/open", "--all", "--count", "1")
    everything.complaint()
    monitor = desk.start("monitor", "/open", "--json")
    assert monitor.complaint() == "monitoring as /open:2.2"
    desk.do("publish", "/open", "any.topic", "x")
    assert everything.rest().out == "2.3 [any.topic]: x\n"
    while (copy := monitor.object()).get("terms") != "any.topic":
        assert copy["kind"] in ("message", "notice")
    assert (copy["copy"], copy["body"]) == (True, "x")


#: What a listener that owns a name says to its master, and what it is answered.
WORDS = [
    ("join", {"kind": "join"}),
    ("yes", {"errno": 0, "message": "", "detail": {}}),
    (
        "own name='demo.two' flags=do_not_queue",
        {"kind": "own", "name": "demo.two", "flags": ["do_not_queue"]},
    ),
    ("yes outcome=1", {"errno": 0, "message": "", "detail": {"outcome": 1}}),
    (
        "subscribe terms='a k=v' overflow='gap'",
        {"kind": "subscribe", "terms": "a k=v", "overflow": "gap"},
    ),
    ("yes", {"errno": 0, "message": "", "detail": {}}),
    ("unsubscribe terms='a k=v'", {"kind": "unsubscribe", "terms": "a k=v"}),
    ("yes", {"errno": 0, "message": "", "detail": {}}),
]


@pytest.mark.parametrize("as_json", [False, True])
def test_d19_monitor_shows_the_talk_with_the_master_in_words(desk: Desk, as_json: bool) -> None:
    """Who asks for what, and what is answered: as words, or as objects."""
    master = desk.start("bus", "create", "/demo", "--allow-monitors")
    master.line()
    monitor = desk.start("monitor", "/demo", *["--json"] * as_json)
    assert monitor.complaint() == "monitoring as /demo:1.1"
    listening = ("listen", "/demo", "a", "k=v", "--timeout", "0.01", "--name", "demo.two")
    assert desk.do(*listening).code == DONE
    for text, fields in WORDS:
        if as_json:
            # It may see how it got its own right.
            while (copy := monitor.object())["destination"] == "/demo:1.1":
                pass
            assert copy.get("request", copy.get("answer")) == fields
        else:
            while " to 1.1" in (line := monitor.message()):
                pass
            assert line.partition(": ")[2] == text


def test_other_users_need_to_be_allowed(desk: Desk) -> None:
    """Users are named when the bus is created; the own one is always among them."""
    master = desk.start("bus", "create", "/demo", "--allow-uid", "1000", "--allow-uid", "1001")
    master.line()
    assert desk.do("listen", "/demo", "--timeout", "0.01").code == DONE
    assert desk.do("bus", "create", "/other", "--allow-uid", "-1").code == USAGE


# --- what there is ---


@pytest.mark.usefixtures("bus")
def test_lists(desk: Desk) -> None:
    """Each list is a table with a headline, or one JSON object a line with the same keys."""
    listener = desk.start("listen", "/demo", "sensors", "--name", "demo.log")
    listener.complaint()
    for what in ("buses", "endpoints", "addresses", "matches", "queues"):
        headline, *lines = desk.do("list", what, "/demo").out.splitlines()
        rows = desk.do("list", what, "/demo", "--json").objects()
        assert len(lines) == len(rows) > 0
        assert headline.split() == " ".join(rows[0]).replace("_", " ").split()
        assert all(row["path"] == "/demo" for row in rows)
    addresses = [row["address"] for row in desk.do("list", "addresses", "--json").objects()]
    assert addresses == ["master", "1.1", "demo.log"]
    assert desk.do("list", "lanes", "/demo").code == DONE
    code, _, complaint = desk.do("list", "endpoints", "/nowhere")
    assert code == REFUSED
    assert "/nowhere" in complaint


def test_empty_list_is_said(desk: Desk) -> None:
    """Nothing to show is said on standard error; programs read nothing."""
    assert desk.do("list", "buses") == (DONE, "", "none\n")
    assert desk.do("list", "buses", "--json") == (DONE, "", "")


# --- ends ---


@pytest.mark.usefixtures("bus")
def test_ctrl_c_is_quiet(desk: Desk) -> None:
    """Ctrl-C leaves in good order, without a word but for the exit code."""
    for arguments in (("listen", "/demo"), ("serve", "/demo", "a", "--echo")):
        running = desk.start(*arguments)
        running.complaint()
        code, out, complaint = running.end(signal.SIGINT)
        assert (code, out, complaint.strip()) == (INTERRUPTED, "", "")


@pytest.mark.usefixtures("bus")
def test_reader_that_has_gone_is_no_traceback(desk: Desk) -> None:
    """Who prints to a pipe that nobody reads ends, and says nothing."""
    listener = desk.start("listen", "/demo", "--name", "demo.log")
    listener.complaint()
    listener.close_output()
    desk.do("send", "/demo", "demo.log", "x")
    assert listener.rest()[::2] == (NO_READER, "")


def test_d16_listener_survives_its_agent(desk: Desk, agent: Running, bus: Running) -> None:
    """When the agent is killed and comes back, so does the listener, and it says what it lost."""
    listener = desk.start("listen", "/demo", "sensors", "--json")
    listener.complaint()
    agent.end(signal.SIGKILL)
    again = desk.start("node")
    again.line()
    assert listener.object()["reason"] == "agent_restart"
    assert desk.do("publish", "/demo", "sensors", "back").code == DONE
    item = listener.object()
    while item["kind"] != "message":
        item = listener.object()
    assert item["body"] == "back"
    assert bus.end().code == DONE


# --- usage ---


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("send", "/demo", "%zz", "x"), "Invalid value for 'TO'"),
        (("send", "", "1.1", "x"), "Invalid value for 'PATH'"),
        (("send", "x" * 200, "1.1", "x"), "Invalid value for 'PATH'"),
        (("publish", "/demo", "a..b", "x"), "Invalid value for 'TERMS'"),
        (("listen", "/demo", "a=b", "c"), "Invalid value for '[TERMS]...'"),
        (("listen", "/demo", "a", "--all"), "either TERMS or --all"),
        (("listen", "/demo", "--timeout", "nan"), "Invalid value for '--timeout'"),
        (("request", "/demo", "1.1", "x", "--deadline", "0"), "Invalid value for '--deadline'"),
        (("serve", "/demo", "a"), "either --echo or --exec"),
        (("serve", "/demo", "a", "--exec", "'"), "--exec: No closing quotation"),
        (("serve", "/demo", "a", "--exec", ""), "--exec: no program"),
        (("list", "things"), "'things' is not one of"),
        (("node", "--config", "/nowhere"), "'/nowhere' does not exist"),
        (("fly",), "No such command 'fly'"),
    ],
)
def test_wrong_usage_names_the_argument(
    bare_desk: Desk, arguments: tuple[str, ...], says: str
) -> None:
    """What makes no sense in itself is told before anybody is asked."""
    code, out, complaint = bare_desk.do(*arguments)
    assert (code, out) == (USAGE, "")
    assert says in complaint


def test_help_tells_exit_codes_and_examples(bare_desk: Desk) -> None:
    """Every command explains itself, with examples at the end."""
    assert "Exit codes:" in bare_desk.do("--help").out
    for command in (
        ("node",),
        ("status",),
        ("bus", "create"),
        ("join",),
        ("send",),
        ("publish",),
        ("listen",),
        ("request",),
        ("serve",),
        ("list",),
        ("monitor",),
    ):
        code, out, _ = bare_desk.do(*command, "--help")
        assert code == DONE
        _, _, examples = out.partition("Examples:")
        assert f"afbus {' '.join(command)}" in examples
