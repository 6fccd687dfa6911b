"""Importing this forbids the network to the process, for good; what runs on this machine may be reached."""

import sys
from typing import Any

LOCAL = (None, "", "localhost", "127.0.0.1", "::1")


class NetworkError(BaseException):
    """Somebody reached for the network. No `Exception`, which a library that tries might catch."""


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):  # else a file's name
        host = arguments[1][0]
    else:
        return
    if (host.decode() if isinstance(host, bytes) else host) not in LOCAL:
        raise NetworkError(f"{event}: {host}")


sys.addaudithook(refuse)
