"""The HTTP proxy of the environment, by the rules by which gRPC goes through one."""

from __future__ import annotations

import base64
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from topq_dist.ps.security.address import Address

# the first that is there counts, an empty one too, and whatever the server speaks
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")
_LONGEST_ANSWER_BYTES = 16_384


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy, and the variable that names it; credentials are "user:password", or nothing."""

    variable: str
    host: str
    port: int
    credentials: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"the proxy {self.host}:{self.port} of {self.variable}"

    def connect(self, address: Address, timeout_s: float) -> socket.socket:
        """Return a socket that leads to `address`.

        Raises OSError, naming the proxy, where it cannot be reached or does not take us there.
        """
        try:
            end = socket.create_connection((self.host, self.port), timeout_s)
        except OSError as error:
            raise OSError(f"{self}: {error.strerror or error}{_remedy(address)}") from error
        try:
            end.sendall(self._request(address))
            answer = b""
            while b"\r\n\r\n" not in answer and len(answer) < _LONGEST_ANSWER_BYTES:
                # a byte at a time: what comes behind the answer is the server's
                more = end.recv(1)
                if not more:
                    break
                answer += more
        except OSError as error:
            end.close()
            raise OSError(f"{self}: {error.strerror or error}{_remedy(address)}") from error
        status = answer.partition(b"\r\n")[0].decode("ascii", "replace")
        words = status.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or words[1] != "200":
            end.close()
            said = status[:100] or "nothing"
            raise OSError(f"{self} does not lead there, it says: {said}{_remedy(address)}")
        return end

    def _request(self, address: Address) -> bytes:
        lines = [f"CONNECT {address} HTTP/1.0", f"Host: {address}"]
        if self.credentials:
            encoded = base64.b64encode(self.credentials.encode()).decode()
            lines.append(f"Proxy-Authorization: Basic {encoded}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _remedy(address: Address) -> str:
    return f"; to do without it, add {address.host} to no_proxy"


def proxy_of(address: Address, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Return the proxy that a channel to `address` goes through; None: it goes there itself.

    Loopback and Unix sockets have none: see ClientSecurity.channel.
    """
    if address.is_loopback:
        return None
    variable = next((name for name in _PROXIES if name in environment), None)
    if variable is None or _is_exempt(address.host, environment):
        return None
    try:
        url = urlsplit(environment[variable])
        host, port = url.hostname, url.port
    except ValueError:
        return None
    if url.scheme != "http" or not host:
        return None
    credentials = ""
    if url.username is not None:
        credentials = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return Proxy(variable=variable, host=host, port=port or 443, credentials=credentials)


def _is_exempt(host: str, environment: Mapping[str, str]) -> bool:
    exceptions = next((environment[name] for name in _EXCEPTIONS if name in environment), "")
    return any(_covers(one.strip().lower(), host.lower()) for one in exceptions.split(","))


def _covers(exception: str, host: str) -> bool:
    if "/" in exception:
        return _in_network(host, exception)
    domain = exception.removeprefix(".")
    return bool(domain) and (host == domain or host.endswith("." + domain))


def _in_network(host: str, network: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False
