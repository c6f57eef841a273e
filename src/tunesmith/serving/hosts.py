"""By which names a server may be asked: no page of another site may reach it under a name of its own.

A page whose name comes to mean this machine (DNS rebinding) is, for the browser, a page of this server, and could read
its answers. Its name gives it away: it stands in Host. Addresses in digits and names of the machine itself cannot be
made to mean another one, so they need no permission. A page that only sends, and reads nothing, is told by Origin.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tunesmith.errors import ConfigError
from tunesmith.serving.faults import Refusal

OPTION = "--allowed-host"
_ANY = "*"
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^][:/@\s]+)(?::\d*)?\Z")  # RFC 3986, 3.2, without a user
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\Z")
_MOST_SHOWN = 256


@dataclass(frozen=True)
class Hosts:
    """The names of a server beside localhost; ``*.name`` stands for all below ``name``, ``*`` for any."""

    names: frozenset[str] = frozenset()

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise a Refusal (403) where a request came by another name, or is a POST of another site's page.

        Args:
            method: of the request.
            headers: by their names in small letters.
        """
        if _ANY in self.names:
            return
        host = headers.get("host")  # HTTP/1.0 knows requests without one; no browser sends them
        name = None if host is None else _name_of(host)
        if name is not None and not (_address(name) or self._knows(name)):
            raise _refused(f"This server is not known as {_shown(host)}", "host_not_allowed")
        origin = headers.get("origin")
        # A proxy may put its own name into Host; browsers then still say what is asked for by its own page.
        if method != "POST" or origin is None or headers.get("sec-fetch-site") == "same-origin":
            return
        page = _name_of(origin.partition("://")[2])
        if not page or not (page == name or self._knows(page)):
            raise _refused(f"Pages of {_shown(origin)} may not ask this server", "origin_not_allowed")

    def _knows(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost"):  # RFC 6761, 6.3
            return True
        if (address := _address(name)) is not None and address.is_loopback:
            return True
        parts = name.split(".")
        above = (".".join(parts[place:]) for place in range(1, len(parts)))
        return name in self.names or any(f"*.{parent}" in self.names for parent in above)


def hosts_of(listens_on: str, allowed: Iterable[str], *, has_key: bool) -> Hosts:
    """The names of a server.

    Args:
        listens_on: the address or name that it was told to listen on.
        allowed: by the operator, as ``allowed_name`` takes them.
        has_key: whether requests need a key, which no page of another site has: any name will do then.

    Raises:
        ConfigError: one of ``allowed`` is no name.
    """
    try:
        names = [allowed_name(name) for name in allowed]
    except ValueError as error:
        raise ConfigError(
            OPTION, str(error), "give a name as in models.example.org, without a port"
        ) from None
    own = [listens_on, socket.gethostname()]
    return Hosts(
        frozenset([*names, *(name.lower().rstrip(".") for name in own), *([_ANY] if has_key else ())])
    )


def allowed_name(text: str) -> str:
    """A name as requests would have it: in small letters, umlauts and the like as browsers send them.

    Raises:
        ValueError: it is none; ``*``, and ``*.`` before a name, are.
    """
    if text == _ANY:
        return text
    name = text.strip().lower().rstrip(".")
    if _address(name.strip("[]")) is not None:
        return name.strip("[]")
    wild, bare = ("*.", name[2:]) if name.startswith("*.") else ("", name)
    try:
        name = wild + bare.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    if not _NAME.match(name):
        raise ValueError(f"{text[:_MOST_SHOWN]!r} is no name of a machine")
    return name


def _name_of(authority: str) -> str:
    """``name:port`` without the port, in small letters; "" where it is nothing of the kind."""
    found = _AUTHORITY.match(authority.strip())
    return found.group(1).strip("[]").lower().rstrip(".") if found else ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _shown(text: str | None) -> str:
    return repr((text or "")[:_MOST_SHOWN])


def _refused(message: str, code: str) -> Refusal:
    return Refusal(403, f"{message}; {OPTION} NAME at its start allows a name", code)
