"""The hub of pretrained models."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request

import huggingface_hub.constants


def hub_is_there() -> bool:
    """Whether the hub's name is known here or to a proxy: without a network a call would be tried for a minute."""
    if "https" in urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
