"""The systemd files: what systemd says of them, and that the agent can live in their sandboxes."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.cases.actors import PATH as BUS
from tests.cases.actors import PATIENCE_S, Fleet, Stage
from tests.deploy.manifest import DEPLOY, find_port, run_tool
from tests.deploy.unit import Unit, enter_sandbox, find_calls, load_seccomp

import afbus.master.service
import afbus.node.agent
import afbus.node.links  # noqa: F401 (as above)
from afbus.cli.main import main
from afbus.node.config import load_config
from afbus.proto.address import BusAddress
from afbus.proto.errors import NotConnected
from afbus.proto.limits import INLINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.cases.actors import Actor

FOLDER = DEPLOY / "systemd"
NODE, MASTER_UNIT = FOLDER / "afbus-node.service", FOLDER / "afbus-master.service"
SESSION = FOLDER / "user" / "afbus-node.service"
SYSUSERS, TMPFILES = FOLDER / "afbus.sysusers.conf", FOLDER / "afbus.tmpfiles.conf"

#: The highest exposure that `systemd-analyze security` may find, in tenths.
EXPOSURE = {NODE: 15, MASTER_UNIT: 12}
VERIFY = ("--man=no", "--recursive-errors=no")
#: Whose number stands for the user of a unit.
SERVICE_UID = 65_501

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system with the files where README.md puts them, and a command `afbus`."""
    places = {
        "usr/lib/systemd/system": [NODE, MASTER_UNIT],
        "usr/lib/systemd/user": [SESSION],
        "usr/lib/sysusers.d": [SYSUSERS],
        "usr/lib/tmpfiles.d": [TMPFILES],
    }
    for place, files in places.items():
        (tmp_path / place).mkdir(parents=True)
        for file in files:
            name = file.name.replace(".sysusers", "").replace(".tmpfiles", "")
            shutil.copy(file, tmp_path / place / name)
    (tmp_path / "etc").mkdir()
    (tmp_path / "usr/bin").mkdir()
    for command in ("afbus", "kill"):
        (tmp_path / "usr/bin" / command).touch(mode=0o755)
    return tmp_path


# --- what systemd says ---


@needs_analyze
@pytest.mark.parametrize("unit", [NODE, MASTER_UNIT], ids=["node", "master"])
def test_systemd_understands_each_service(unit: Path, root: Path) -> None:
    """No unknown setting, no value that is passed over, and the command is found."""
    assert run_tool("systemd-analyze", "verify", *VERIFY, f"--root={root}", unit.name) == ""


@needs_analyze
def test_systemd_understands_the_service_of_a_session(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above; a user's manager takes no other root, so the command is named with its place."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(root))
    unit = root / "usr/lib/systemd/user" / SESSION.name
    command = f"ExecStart={root}/usr/bin/afbus "
    unit.write_text(unit.read_text().replace("ExecStart=afbus ", command))
    assert run_tool("systemd-analyze", "verify", "--user", *VERIFY, unit) == ""


@needs_analyze
@pytest.mark.parametrize(("unit", "tenths"), EXPOSURE.items(), ids=["node", "master"])
def test_services_are_hardened(unit: Path, tenths: int, root: Path) -> None:
    """`systemd-analyze security` finds no more exposed than was decided in the unit's comments."""
    options = ["--offline=yes", f"--root={root}", "--no-pager", f"--threshold={tenths}"]
    run_tool("systemd-analyze", "security", *options, unit.name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers here")
def test_users_and_folders_are_made(root: Path) -> None:
    """The users of the units exist then, and the folder of the door is the agent's."""
    run_tool("systemd-sysusers", f"--root={root}")
    lines = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    users = {fields[0]: int(fields[2]) for fields in lines}
    assert set(users) == {Unit(NODE).get("User"), Unit(MASTER_UNIT).get("User")}
    run_tool("systemd-tmpfiles", "--create", f"--root={root}")
    for path, mode, user in (
        ("run/afbus", 0o755, users["afbus"]),
        ("etc/afbus", 0o755, 0),
        (f"var/lib/{Unit(NODE).get('StateDirectory')}", 0o700, users["afbus"]),
        (f"var/lib/{Unit(MASTER_UNIT).get('StateDirectory')}", 0o700, users["afbus-master"]),
    ):
        made = (root / path).stat()
        assert (made.st_mode & 0o7777, made.st_uid) == (mode, user), path


# --- what has to agree ---


def test_units_and_settings_agree() -> None:
    """The door is in the unit's folder, and everybody may come to it; so may the session's user."""
    settings = load_config(FOLDER / "node.toml")
    node = Unit(NODE)
    assert settings.door is not None
    assert settings.door.parent == Path("/run") / node.get("RuntimeDirectory")
    assert settings.mode == 0o666
    assert node.command[node.command.index("--config") + 1] == "/etc/afbus/node.toml"
    session = Unit(SESSION)
    folder = session.get("RuntimeDirectory")
    assert session.command[-1] == f"%t/{folder}/node.sock"
    for unit in (node, session):
        # What containers have mounted must be there when the agent is back.
        assert unit.get("RuntimeDirectoryPreserve") == "yes"
    lines = [line.split() for line in TMPFILES.read_text().splitlines()]
    user, group, mode = node.get("User"), node.get("Group"), node.get("RuntimeDirectoryMode")
    assert ["d", str(settings.door.parent), mode, user, group, "-", "-"] in lines


def test_d17_agent_sees_who_its_clients_are() -> None:
    """The settings that would make all users one, or hide their processes, are off."""
    node, session = Unit(NODE), Unit(SESSION)
    assert node.get("PrivateUsers") == "no"
    assert node.get("ProtectProc") == "default"
    assert node.get("ProcSubset") == "all"
    # In a user's manager each of these would need a user namespace.
    for key in ("PrivateTmp", "PrivateDevices", "ProtectSystem", "ProtectHome", "ProtectProc"):
        assert session.get(key) == ""
    for unit in (node, session):
        assert unit.get("PrivatePIDs") == ""


# --- what the agent can live with ---


def check_sandbox(unit: Unit) -> None:
    """See that the sandbox of a unit is one."""
    attempts: list[Callable[[], object]] = [
        lambda: socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM),
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC),
        lambda: os.chown("/", -1, -1),
    ]
    if unit.get("ProtectSystem"):
        attempts += [
            lambda: os.open("/tmp/afbus", os.O_WRONLY | os.O_CREAT),
            lambda: os.listdir("/root"),
        ]
    for number, attempt in enumerate(attempts):
        try:
            attempt()
        except OSError:
            continue
        raise AssertionError(f"attempt {number} has got out of the sandbox")


def be_service(
    stage: Stage, unit: str, command: list[str], calls: list[str], folders: list[str], notify: str
) -> None:
    """Be a service as its unit wants it."""
    enter_sandbox(Unit(Path(unit)), calls, SERVICE_UID, folders)
    check_sandbox(Unit(Path(unit)))
    os.environ["NOTIFY_SOCKET"] = notify
    sys.argv = command
    try:
        main()
    except SystemExit as error:
        stage.tell(error.code)


def be_client(stage: Stage) -> None:
    """Be a member who sends large bodies to itself, before the agent is lost and afterwards."""
    with stage.join(name="client") as one:
        me = BusAddress(BUS, "client")
        body = bytes(2 * INLINE_BYTES)
        one.sendto(body, me)
        assert one.recv(3 * INLINE_BYTES) == body
        stage.tell("exchanged")
        with pytest.raises(NotConnected):
            one.recv(9)
        stage.tell("lost")
        # This waits for the next agent.
        one.sendto(body, me)
        while (answer := one.recvfrom(3 * INLINE_BYTES))[1].is_kernel:
            pass
        assert answer == (body, me)
        stage.tell("exchanged again")


def run_as_service(stage: Stage, command: list[str]) -> None:
    """Run a command as the user of the unit, outside of its sandbox; tell how it ended."""
    os.setgroups([])
    os.setresgid(SERVICE_UID, SERVICE_UID, SERVICE_UID)
    os.setresuid(SERVICE_UID, SERVICE_UID, SERVICE_UID)
    sys.argv = command
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            main()
    except SystemExit as error:
        stage.tell([error.code, printed.getvalue()])


class Service:
    """A service in its sandbox, who listens to what it notifies, and its clients.

    `door` is its socket; it lies in one of the folders that it may write to.
    """

    def __init__(self, unit: Path, folder: Path, name: str) -> None:
        self.unit = Unit(unit)
        self.command = self.unit.command
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / f"{name}.notify"))
        (folder / f"{name}.notify").chmod(0o666)
        self._notify.settimeout(PATIENCE_S)
        self.state = folder / f"{name}.state"
        self.door = folder / f"{name}.run" / name
        self._folders = [self.state, self.door.parent]
        for own, mode in ((self.state, 0o700), (self.door.parent, 0o755)):
            own.mkdir()
            own.chmod(mode)
            if self.unit.get("User"):
                os.chown(own, SERVICE_UID, SERVICE_UID)
        self.fleet = Fleet(self.door)

    def start(self) -> Actor:
        """Start it, and wait for READY=1."""
        actor = self.fleet.start(
            be_service,
            unit=str(self.unit.path),
            command=self.command,
            calls=sorted(find_calls(self.unit)),
            folders=list(map(str, self._folders)),
            notify=self._notify.getsockname(),
        )
        watched = select.select([self._notify, actor.socket], [], [], PATIENCE_S)[0]
        assert watched == [self._notify], actor.hear()
        assert self._notify.recv(100) == b"READY=1"
        return actor

    def run(self, *words: object) -> str:
        """Run a command of afbus as the user of the unit; return what it printed."""
        actor = self.fleet.start(run_as_service, command=["afbus", *map(str, words)])
        code, printed = actor.hear()
        assert code == 0, printed
        actor.finish()
        return str(printed)

    def close(self) -> None:
        """End all."""
        self.fleet.close()
        self._notify.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that other users find, for what can be tried here."""
    if os.geteuid() != 0:
        pytest.skip("only root can be the user of the unit")
    if load_seccomp() is None or shutil.which("systemd-analyze") is None:
        pytest.skip("needs libseccomp, and systemd-analyze for the names of the system calls")
    folder = Path(tempfile.mkdtemp(prefix="afbus-unit-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def make_node(unit: Path, place: Path) -> Service:
    """An agent as its unit wants it, to be started."""
    made = Service(unit, place, "node.sock")
    settings = place / "node.toml"
    # So that a busy machine does not let the time for clients to come back pass.
    text = f"grace_s = {PATIENCE_S}\n"
    if made.unit.get("User"):
        text += (FOLDER / "node.toml").read_text().replace("/run/afbus/node.sock", str(made.door))
        made.command[made.command.index("--config") + 1] = str(settings)
    else:
        made.command[made.command.index("--door") + 1] = str(made.door)
        made.command += ["--config", str(settings)]
    settings.write_text(text)
    return made


@pytest.fixture(params=[NODE, SESSION], ids=["node", "session"])
def node_service(request: pytest.FixtureRequest, place: Path) -> Iterator[Service]:
    """An agent as its unit wants it, to be started."""
    made = make_node(request.param, place)
    yield made
    made.close()


@pytest.fixture
def master_service(place: Path) -> Iterator[Service]:
    """A master as its unit wants it, to be started, and an address that is free."""
    made = Service(MASTER_UNIT, place, "master")
    made.run("master", "init", "--state", made.state, "demo")
    made.command += ["--state", str(made.state), "--listen", "127.0.0.1:0"]
    yield made
    made.close()


@pytest.mark.cluster
def test_case3_agent_can_live_in_its_sandbox(node_service: Service) -> None:
    """It says READY=1, serves, gets its clients back after a kill -9, and ends in good order."""
    agent = node_service.start()
    master = node_service.fleet.start_master()
    client = node_service.fleet.start(be_client)
    assert client.hear() == "exchanged"
    agent.kill()
    assert client.hear() == "lost"
    agent = node_service.start()
    assert client.hear() == "exchanged again"
    client.finish()
    master.kill()
    agent.send_signal(signal.SIGTERM)
    assert agent.hear() == 0
    agent.finish()
    assert not node_service.door.exists()


@pytest.mark.cluster
def test_case28_master_can_live_in_its_sandbox(master_service: Service) -> None:
    """It says READY=1, answers its operator, comes back from a kill -9, and ends in good order."""
    state = master_service.state
    (condition,) = master_service.unit.get_all("ConditionPathExists")
    assert (state / Path(condition).name).exists()
    for number in (signal.SIGKILL, signal.SIGTERM):
        master = master_service.start()
        assert master_service.run("token", "--state", state, "--name", "worker-1")
        assert "demo" in master_service.run("master", "status", "--state", state)
        # What `systemctl reload` sends.
        master.send_signal(signal.SIGHUP)
        assert "demo" in master_service.run("master", "status", "--state", state)
        if number == signal.SIGKILL:
            master.kill()
    master.send_signal(signal.SIGTERM)
    assert master.hear() == 0
    master.finish()
    assert not (state / "master.sock").exists()


@pytest.mark.cluster
def test_case38_node_joins_from_sandbox_to_sandbox(place: Path, master_service: Service) -> None:
    """By the commands of README.md a host becomes a node, and is live for the master."""
    where = f"127.0.0.1:{find_port()}"
    master_service.command[-1] = where
    master_service.start()
    token = place / "token.txt"
    state = master_service.state
    token.write_text(master_service.run("token", "--state", state, "--name", "worker-1"))
    node = make_node(NODE, place)
    try:
        given = ["--state", node.state, "--token-file", token, "--name", "worker-1"]
        assert "worker-1" in node.run("node", "join", *given, where)
        node.command += ["--cluster", str(node.state), "--listen", f"127.0.0.1:{find_port()}"]
        agent = node.start()
        # It asks as often as it takes; the deadline of the test ends that.
        rows: list[dict[str, str]] = []
        while [row["state"] for row in rows] != ["live"]:
            rows = [
                json.loads(line)
                for line in master_service.run(
                    "master", "nodes", "--json", "--state", state
                ).splitlines()
            ]
        assert [row["node"] for row in rows] == ["worker-1"]
        agent.send_signal(signal.SIGTERM)
        assert agent.hear() == 0
        agent.finish()
    finally:
        node.close()
