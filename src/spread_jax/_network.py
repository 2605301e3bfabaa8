"""Whether a host answers, known within two seconds."""

from __future__ import annotations

import socket
import threading
import urllib.parse
import urllib.request

__all__ = ["why_unreachable"]

_SECONDS = 2.0


def why_unreachable(host: str) -> str | None:
    """Why an HTTPS host, or the proxy in front of it, does not answer; None if it does.

    Looking up a host's name has no timeout of its own, hence the thread.
    """
    port = 443
    if proxy := urllib.request.getproxies().get("https"):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"//{proxy}")
        host, port = parts.hostname or host, parts.port or 80
    reached, reason = threading.Event(), [f"no answer in {_SECONDS:.0f} seconds"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), _SECONDS).close()
            reason.clear()
        except OSError as error:
            reason[:] = [str(error)]
        reached.set()

    threading.Thread(target=connect, daemon=True).start()
    reached.wait(_SECONDS)
    why = list(reason)
    return why[0] if why else None
