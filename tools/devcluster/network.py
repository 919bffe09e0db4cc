"""Addresses of one cluster: a block of 4,096 from 198.18.0.0/15, which is reserved for benchmarks and nobody's network."""

import ipaddress
from dataclasses import dataclass

_ALL = ipaddress.ip_network("198.18.0.0/15")
BLOCKS = 32


@dataclass(frozen=True)
class Network:
    """Block number `index`: a link between host and node, a quarter for Services, a half for pods."""

    index: int

    @property
    def _block(self) -> ipaddress.IPv4Network:
        return list(ipaddress.IPv4Network(str(_ALL)).subnets(new_prefix=20))[self.index]

    @property
    def interface(self) -> str:
        """The host's end of the link; its name is also the claim on the block."""
        return f"opd{self.index}"

    @property
    def host(self) -> str:
        return str(self._block[1])

    @property
    def node(self) -> str:
        return str(self._block[2])

    @property
    def services(self) -> str:
        return str(list(self._block.subnets(new_prefix=22))[1])

    @property
    def kubernetes_service(self) -> str:
        return str(ipaddress.IPv4Network(self.services)[1])

    @property
    def pods(self) -> str:
        return str(list(self._block.subnets(new_prefix=21))[1])

    @property
    def pod_gateway(self) -> str:
        return str(ipaddress.IPv4Network(self.pods)[1])
