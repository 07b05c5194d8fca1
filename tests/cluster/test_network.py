"""The interface on which workers meet; `test_two_nodes.py` has two machines meet."""

from __future__ import annotations

import os
import socket

import psutil
import pytest

from finhpc.cluster.network import INTERFACES, interface_of, use_interface_of_node


def test_an_address_has_its_interface() -> None:
    assert interface_of("127.0.0.1") in {"lo", "lo0"}
    for name, addresses in psutil.net_if_addrs().items():
        for found in addresses:
            if found.family == socket.AF_INET:
                assert interface_of(found.address) == name
    assert interface_of("203.0.113.77") is None


@pytest.mark.usefixtures("ray_cluster")
def test_gloo_and_nccl_take_the_nodes_interface_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    for variable in INTERFACES:
        monkeypatch.setenv(variable, "")  # so that what stands there now comes back
        monkeypatch.delenv(variable)
    use_interface_of_node()

    address = ray.util.get_node_ip_address()
    [name] = {os.environ[variable] for variable in INTERFACES}
    assert address in {found.address for found in psutil.net_if_addrs()[name]}
    for variable in INTERFACES:
        monkeypatch.setenv(variable, "mine0")
    use_interface_of_node()
    assert {os.environ[variable] for variable in INTERFACES} == {"mine0"}
