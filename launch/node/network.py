"""Derives torchrun's rendezvous arguments and the network settings of NCCL and Gloo from SkyPilot's variables.

    torchrun *rendezvous(os.environ) ...

SkyPilot lists the private addresses of all nodes in SKYPILOT_NODE_IPS, the head node first.
"""

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from core.errors import ConfigError

MASTER_PORT = 29500  # torchrun's own default
SIOCGIFADDR = 0x8915  # netdevice(7)
EFA_LIBRARIES = ("/opt/amazon/ofi-nccl/lib", "/opt/amazon/efa/lib")


def nodes(environment: Mapping[str, str]) -> tuple[int, list[str]]:
    """The rank of this node, and the addresses of all nodes.

    Raises ConfigError if SkyPilot's variables contradict each other, or if the rank is not a number.
    """
    addresses = (environment.get("SKYPILOT_NODE_IPS") or "127.0.0.1").split()
    text = environment.get("SKYPILOT_NODE_RANK") or "0"
    if not text.isdecimal():
        raise ConfigError(f"SKYPILOT_NODE_RANK is {text!r}, must be the number of this node; SkyPilot counts from 0")
    rank = int(text)
    if rank >= len(addresses):
        raise ConfigError(f"SKYPILOT_NODE_RANK is {rank}, but SKYPILOT_NODE_IPS has {len(addresses)} addresses")
    return rank, addresses


def ranks_per_node(environment: Mapping[str, str]) -> int:
    """The number of ranks on this node: RANKS_PER_NODE or, if it is not set, one rank per GPU. Raises ConfigError."""
    text = environment.get("RANKS_PER_NODE") or environment.get("SKYPILOT_NUM_GPUS_PER_NODE") or "1"
    if not text.isdecimal():
        raise ConfigError(f"RANKS_PER_NODE is {text!r}, must be a whole number; leave it empty for one rank per GPU")
    return max(1, int(text))


def rendezvous(environment: Mapping[str, str]) -> list[str]:
    """torchrun's arguments for a static rendezvous. After a failure, the whole job restarts from its checkpoint."""
    rank, addresses = nodes(environment)
    arguments = [f"--nnodes={len(addresses)}", f"--node-rank={rank}", f"--nproc-per-node={ranks_per_node(environment)}"]
    # Several nodes must know the port in advance. A single node takes any free port, because other jobs may run on it.
    port = MASTER_PORT if len(addresses) > 1 else free_port()
    return [*arguments, f"--master-addr={addresses[0]}", f"--master-port={port}"]


def check_port(environment: Mapping[str, str]) -> None:
    """Check, on the head node of several nodes, the port at which all ranks meet.

    Raises ConfigError if another program uses the port.
    """
    rank, addresses = nodes(environment)
    if rank > 0 or len(addresses) == 1:
        return
    with socket.socket() as probe:
        # torch sets this option too. It lets a program use the port while connections of an earlier job are still
        # closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", MASTER_PORT))
            probe.listen()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise ConfigError(
                f"port {MASTER_PORT} of the head node {addresses[0]}, at which all ranks meet, is in use, perhaps by "
                f"another job of several nodes; end that program (on the node: sudo ss -ltnp 'sport = :{MASTER_PORT}' "
                "names it), or take other machines, and start again"
            ) from error


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settings(environment: Mapping[str, str], devices: Path = Path("/dev/infiniband")) -> dict[str, str]:
    """Variables for NCCL and Gloo. Variables that the user has set are left out."""
    rank, addresses = nodes(environment)
    found = {"NCCL_DEBUG": "WARN"}
    if len(addresses) > 1:
        # By default Gloo takes the interface to which the host name resolves (often 127.0.1.1 on Ubuntu), and NCCL may
        # take a docker bridge. Both must take the interface with the address that the other nodes know.
        interface = interface_of(addresses[rank])
        if interface:
            found |= {"NCCL_SOCKET_IFNAME": f"={interface}", "GLOO_SOCKET_IFNAME": interface}
        libraries = [path for path in EFA_LIBRARIES if Path(path).is_dir()]
        if any(devices.glob("uverbs*")) and len(libraries) == len(EFA_LIBRARIES):
            # NCCL uses EFA, AWS's fast network, through a libfabric plugin, which NCCL finds on the library path.
            path = ":".join([*libraries, *filter(None, [environment.get("LD_LIBRARY_PATH")])])
            found |= {"FI_PROVIDER": "efa", "LD_LIBRARY_PATH": path}
    return {name: value for name, value in found.items() if name == "LD_LIBRARY_PATH" or not environment.get(name)}


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address, or None if there is no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = array.array("b", struct.pack("256s", name.encode()[:15]))
            try:
                fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(request.tobytes()[20:24]) == address:
                return name
    return None
