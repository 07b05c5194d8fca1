"""A Ray cluster of two nodes on one machine: processes of their own, and as root network namespaces of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.waiting import free_port, wait_until

RAY = str(Path(sys.executable).parent / "ray")
SUBNET = "10.213.7"


def ray_environment(home: Path) -> dict[str, str]:
    """Token authentication with a home, and so a token, of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it started, as a power cut would."""
    with contextlib.suppress(psutil.Error):
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.Error):
                member.kill()
    process.wait(180)


@dataclass
class Node:
    """One machine of the cluster: its address, and the words that run a command on it."""

    address: str
    inside: list[str]
    process: subprocess.Popen[bytes] | None = None

    def train_workers(self) -> list[psutil.Process]:
        """The Ray Train workers that run on this node."""
        assert self.process is not None
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "TrainWorker" in " ".join(child.cmdline()):
                    found.append(child)
        return found


@dataclass
class TwoNodes:
    """`head` and `worker`, a logical CPU each."""

    folder: Path
    head: Node
    worker: Node
    separate: bool  # network namespaces of their own
    port: int = field(default_factory=free_port)

    @property
    def environment(self) -> dict[str, str]:
        return ray_environment(self.folder / "home")

    def start(self, node: Node) -> None:
        words = [RAY, "start", "--node-ip-address", node.address, "--num-cpus", "1", "--block"]
        words += ["--object-store-memory", str(100 * 2**20), "--dashboard-agent-listen-port", str(free_port())]
        if node is self.head:
            words += ["--head", "--port", str(self.port), "--include-dashboard", "false"]
            words += ["--temp-dir", f"/tmp/ray-{self.port}"]
        else:
            words += ["--address", f"{self.head.address}:{self.port}"]
        with open(self.folder / "ray.log", "ab") as log:
            node.process = subprocess.Popen([*node.inside, *words], env=self.environment, stdout=log, stderr=log)

    def lose(self, node: Node) -> None:
        assert node.process is not None
        kill_family(node.process)

    def cpus(self) -> int:
        """Logical CPUs of the living nodes; 0 while there is no cluster."""
        words = f"import ray; ray.init('{self.head.address}:{self.port}', log_to_driver=False, logging_level='ERROR'); "
        words += "print(int(ray.cluster_resources().get('CPU', 0)))"
        command = [*self.head.inside, sys.executable, "-c", words]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=300)
        return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else 0

    def wait_for_cpus(self, count: int) -> None:
        wait_until(lambda: self.cpus() == count, log=self.folder / "ray.log", pause_s=0.5)


@contextmanager
def two_nodes(folder: Path) -> Iterator[TwoNodes]:
    """The cluster, with token authentication; nothing of it is left afterwards."""
    (folder / "home").mkdir(parents=True)
    names = [f"finhpc-{os.getpid()}-{end}" for end in ("head", "worker")]
    separate = _namespaces(names)
    if separate:
        ends = [Node(f"{SUBNET}.{i + 1}", ["ip", "netns", "exec", name]) for i, name in enumerate(names)]
    else:
        ends = [Node("127.0.0.1", []), Node("127.0.0.1", [])]
    nodes = TwoNodes(folder, *ends, separate)
    subprocess.run([RAY, "get-auth-token", "--generate"], env=nodes.environment, check=True, capture_output=True)
    try:
        nodes.start(nodes.head)
        nodes.wait_for_cpus(1)
        nodes.start(nodes.worker)
        nodes.wait_for_cpus(2)
        yield nodes
    finally:
        for node in ends:
            if node.process is not None:
                kill_family(node.process)
        for name in names if separate else ():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        shutil.rmtree(f"/tmp/ray-{nodes.port}", ignore_errors=True)


def _namespaces(names: list[str]) -> bool:
    """Make two network namespaces joined by a cable; False where this user or machine may not."""
    if os.geteuid() or not shutil.which("ip"):
        return False
    first, second = names
    steps = [f"netns add {first}", f"netns add {second}"]
    steps += [f"link add finhpc0 netns {first} type veth peer name finhpc1 netns {second}"]
    for i, name in enumerate(names):
        steps += [f"-n {name} addr add {SUBNET}.{i + 1}/24 dev finhpc{i}"]
        steps += [f"-n {name} link set finhpc{i} up", f"-n {name} link set lo up"]
    for step in steps:
        if subprocess.run(["ip", *step.split()], capture_output=True).returncode:
            for name in names:
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)
            return False
    return True
