"""TCP ports of this machine."""

import socket

from opd_core.errors import UnavailableError

EVERYWHERE = "::"  # every address of the machine: of both families, or of IPv4 where it has no other


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on `host`, a literal of either family or `EVERYWHERE`.

    Raises:
        UnavailableError: somebody else listens there, or the machine has no such address.
    """
    dual = host == EVERYWHERE and socket.has_dualstack_ipv6()
    address = "0.0.0.0" if host == EVERYWHERE and not dual else host  # noqa: S104
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=128, dualstack_ipv6=dual)
    except OSError as error:
        raise UnavailableError(
            f"cannot listen on {in_url(host)}:{port}: {_why(error)}; free it, or choose another port or address"
        ) from error


def _why(error: OSError) -> str:
    return str(error.strerror).partition(" (while ")[0]  # create_server adds the address, as a tuple


def in_url(host: str) -> str:
    """`host` as it stands before a port: a literal of IPv6 has brackets."""
    return f"[{host}]" if ":" in host else host


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on now, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()
