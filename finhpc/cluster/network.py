"""Which network the workers' tensors travel on: the one on which Ray reaches the node."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


class NodeTorchConfig(TorchConfig):
    """Ray Train's set-up of torch's process group, over the interface of the node's own address.

    gloo asks what the machine's name stands for, which many machines answer with 127.0.0.1 or 127.0.1.1;
    it then listens where no other node can reach it. NCCL looks at the interfaces themselves.
    """

    @property
    def backend_cls(self) -> Any:
        return _NodeBackend


class _NodeBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Tell gloo the interface of this node's address; the user's own setting stands."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault(GLOO_INTERFACE, name)


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface with that IP address; None where there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return name
    return None
