"""HTTP requests to a server that the user or the runner has named, and to no other."""

import ipaddress
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit


class _Stay(urllib.request.HTTPRedirectHandler):
    """A redirect is an error with its status: urllib would take the headers, and the key in them, along."""

    def redirect_request(self, *_: Any) -> None:
        return None


def open_url(request: urllib.request.Request | str, timeout: float) -> HTTPResponse:
    """The answer to `request`, http or https.

    An environment's proxy is for other machines: it does not know this one's loopback.

    Raises:
        urllib.error.HTTPError: a status of 300 or more. OSError: nobody answers within `timeout` seconds.
    """
    url = request if isinstance(request, str) else request.full_url
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(urlsplit(url).hostname or "") else []
    answer: HTTPResponse = urllib.request.build_opener(_Stay, *proxies).open(request, timeout=timeout)
    return answer


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
