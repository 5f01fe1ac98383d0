"""Which network interface the workers of a run talk over.

Gloo takes the interface that the machine's own name resolves to, which on many machines is the
loopback: workers on two such machines never meet. The interface that leads to the other workers is
the one to take, and the routing table knows it. (NCCL looks for one by itself.)
"""

from __future__ import annotations

import ipaddress
import os
import socket

INTERFACE = "GLOO_SOCKET_IFNAME"
# An address for documentation (RFC 5737): nobody's, so the default route leads there.
FAR_AWAY = "192.0.2.1"


def route_source(host: str, port: int) -> str:
    """This machine's address on the way to `host`; no packet is sent.

    Raises:
        OSError: if `host` has no address, or no route leads there.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def interface_with(address: str) -> str | None:
    """Name of the interface that has `address`, or None."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.split("%")[0] == address for found in addresses):
            return str(name)
    return None


def use_interface_with(address: str) -> None:
    """Let Gloo talk over the interface that has `address`, unless the environment names one."""
    name = interface_with(address)
    if name is not None:
        os.environ.setdefault(INTERFACE, name)


def use_route_to_master() -> None:
    """Let Gloo take the way to MASTER_ADDR, as torchrun and Slurm set it.

    The master's own name may resolve to its loopback; if workers run elsewhere too, its way out is
    taken then.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        source = route_source(host, port)
        alone = os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE", "1")
        if ipaddress.ip_address(source.split("%")[0]).is_loopback and not alone:
            source = route_source(FAR_AWAY, port)
    except OSError:
        return  # whoever joins the group will say what is wrong with the address
    use_interface_with(source)
