"""The network for the workers' tensors: the one on which Ray reaches the node."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class NodeTorchConfig(TorchConfig):
    """Ray Train's set-up of torch's process group, over the interface of the node's own address.

    gloo resolves the machine's name, which is 127.0.0.1 or 127.0.1.1 on many machines, and would listen where no
    other node can reach it. NCCL takes the first interface that it finds, which on a host with several networks may
    be one that the nodes do not share.
    """

    @property
    def backend_cls(self) -> Any:
        return _NodeBackend


class _NodeBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Set gloo's and NCCL's interface to that of this node's address, unless the user has set them."""
    if name := interface_of(ray.util.get_node_ip_address()):
        for variable in INTERFACES:
            os.environ.setdefault(variable, name)


def interface_of(address: str) -> str | None:
    """Return the name of this machine's network interface with that IP address, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == address for item in addresses):
            return name
    return None
