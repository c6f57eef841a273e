"""URLs of stores as users write them: told from paths, free of secrets, put together."""

import re
from urllib.parse import parse_qsl, urlsplit

from tunesmith.errors import UserError, printable

# Whoever logs in over ssh names a user in the URL, and Azure a container; neither is a secret.
_WITH_USER = ("sftp", "ssh", "abfs", "abfss")
# Parameters of URLs that are keys in themselves: signed ones of AWS, Google and Azure, and what people make up.
_SECRET = re.compile(
    r"signature|credential|token|secret|password|passwd|access_?key|(?:\A|[-_.])(?:api_?key|key|sig)\Z", re.I
)
_REMEDY = "take them out of it and set them in the environment"


def is_url(place: str) -> bool:
    """Whether ``place`` is a URL and no path."""
    return "://" in place


def protocol_of(url: str) -> str:
    """``s3`` of ``s3://bucket/x``; of chained file systems the last one's, which is the one that is reached."""
    return url.rpartition("::")[2].partition("://")[0].lower()


def below(url: str, name: str) -> str:
    """The URL of ``name`` in the folder ``url``."""
    return f"{url.rstrip('/')}/{name}"


def shown(url: str) -> str:
    """``url`` fit for a message: without user, password and parameters that are keys, control characters escaped."""
    parts = [_shown(part) for part in url.split("::")]
    return printable("::".join(parts))


def refuse_secrets(url: str, error: type[UserError]) -> None:
    """Raise ``error`` where ``url`` has a user, a password or a key in it: URLs end in logs and manifests."""
    for part in url.split("::"):
        protocol, separator, rest = part.partition("://")
        if not separator:
            continue
        user, _ = _without_user(rest)
        if user is not None and not _is_login(protocol, user):
            raise error(shown(url), "has credentials in it, which end in logs and checkpoints", _REMEDY)
        if _has_secret_query(part):
            raise error(shown(url), "has a key among its parameters, which ends in logs", _REMEDY)


def is_safe_name(name: str) -> bool:
    """Whether ``name`` stays in the folder it is put into: keys of a bucket may be any text."""
    parts = name.split("/")
    return "\0" not in name and "\\" not in name and not any(part in ("", ".", "..") for part in parts)


def _shown(part: str) -> str:
    protocol, separator, rest = part.partition("://")
    if not separator:
        return part
    user, place = _without_user(rest)
    if _has_secret_query(part):
        place = re.split(r"[?#]", place, maxsplit=1)[0]
    return f"{protocol}://{f'{user}@' if user and _is_login(protocol, user) else ''}{place}"


def _without_user(rest: str) -> tuple[str | None, str]:
    """What stands before the host, and the rest. Keys of AWS have slashes: ``key:sec/ret@bucket/x``."""
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at:
        return user, rest[len(user) + 1 :]
    _, colon, port = authority.rpartition(":")
    if colon and not port.isdigit() and not authority.startswith("[") and "@" in rest:
        user, _, place = rest.rpartition("@")
        return user, place
    return None, rest


def _is_login(protocol: str, user: str) -> bool:
    return ":" not in user and protocol.lower() in _WITH_USER


def _has_secret_query(part: str) -> bool:
    return any(_SECRET.search(name) for name, _ in parse_qsl(_query(part), keep_blank_values=True))


def _query(part: str) -> str:
    try:
        return urlsplit(part).query
    except ValueError:  # brackets that are no address
        return part.partition("?")[2]
