"""Where programs listen: on both stacks, and on IPv4 where there is no other."""

import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from opd_core.errors import UnavailableError
from opd_core.ports import EVERYWHERE, in_url, listen

from tests import ipv4_only


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_everywhere_is_both_families(host: str) -> None:
    with listen(EVERYWHERE, 0) as listener, socket.create_connection((host, listener.getsockname()[1]), 5) as client:
        assert client.getpeername()[0] == host


def test_everywhere_is_ipv4_where_the_kernel_has_no_ipv6() -> None:
    ask = "from opd_core.ports import *; print(listen(EVERYWHERE, 0).getsockname()[0])"
    command = [*ipv4_only.COMMAND, sys.executable, "-c", ask]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "0.0.0.0\n"


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", r"\[::1\]"), (EVERYWHERE, r"\[::\]")])
def test_a_port_that_is_taken_is_named(host: str, shown: str) -> None:
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"^cannot listen on {shown}:{port}: Address already in use; free"):
            listen(host, port)


def test_an_address_of_another_machine_is_named(free_port: Callable[[], int]) -> None:
    with pytest.raises(UnavailableError, match=r"cannot listen on 192.0.2.77:\d+: Cannot assign"):
        listen("192.0.2.77", free_port())


def test_only_literals_of_ipv6_have_brackets() -> None:
    assert [in_url(host) for host in ("127.0.0.1", "localhost", "fd00::7")] == ["127.0.0.1", "localhost", "[fd00::7]"]
