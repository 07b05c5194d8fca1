"""The interface on which workers meet; `test_two_nodes.py` has two machines meet."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from finhpc.cluster.network import GLOO_INTERFACE, interface_of, use_interface_of_node


def test_an_address_has_its_interface() -> None:
    assert interface_of("127.0.0.1") in {"lo", "lo0"}
    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family == socket.AF_INET:
                assert interface_of(found.address) == name
    assert interface_of("203.0.113.77") is None


@pytest.mark.usefixtures("ray_cluster")
def test_gloo_takes_the_nodes_interface_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv(GLOO_INTERFACE, "")  # so that what stands there now comes back
    monkeypatch.delenv(GLOO_INTERFACE)
    use_interface_of_node()

    address = ray.util.get_node_ip_address()
    name = os.environ[GLOO_INTERFACE]
    assert address in {found.address for found in psutil.net_if_addrs()[name]}
    monkeypatch.setenv(GLOO_INTERFACE, "mine0")
    use_interface_of_node()
    assert os.environ[GLOO_INTERFACE] == "mine0"
