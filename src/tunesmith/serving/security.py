"""Who may ask: an API key for every route but ``/health``, an admin key for loading and unloading.

Keys come from the environment, never from the command line, where every user of the machine could read them,
and no message repeats them.
"""

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from tunesmith.errors import ConfigError
from tunesmith.serving.faults import Refusal

API_KEY = "TUNESMITH_API_KEY"
ADMIN_KEY = "TUNESMITH_ADMIN_KEY"


@dataclass(frozen=True)
class Keys:
    """The keys that open this server; without ``api`` anybody may ask, without ``admin`` nobody may load."""

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Keys":
        """The keys in ``TUNESMITH_API_KEY`` and ``TUNESMITH_ADMIN_KEY``.

        Raises:
            ConfigError: one is set to what no client could send.
        """
        return cls(_key(environ, API_KEY), _key(environ, ADMIN_KEY))

    def check(self, authorization: str | None) -> None:
        """Raise a Refusal (401) unless the header holds the API key or the admin key, or none is needed."""
        if self.api is None:
            return
        given = _bearer(authorization)
        # Both comparisons are made whatever the first one says: the time must not tell which key was near.
        is_api, is_admin = _same(given, self.api), _same(given, self.admin)
        if not (is_api | is_admin):
            raise _unauthorised("The API key is missing or wrong; send it as Authorization: Bearer KEY")

    def check_admin(self, authorization: str | None) -> None:
        """Raise a Refusal unless the header holds the admin key: 403 where the server has none."""
        if self.admin is None:
            message = f"Loading and unloading are off: the server was started without {ADMIN_KEY}"
            raise Refusal(403, message, "admin_key_not_set")
        if not _same(_bearer(authorization), self.admin):
            raise _unauthorised("The admin key is missing or wrong; send it as Authorization: Bearer KEY")


def _key(environ: Mapping[str, str], name: str) -> str | None:
    key = environ.get(name)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            name, "is empty or has blanks or letters that no header can carry", "set another key"
        )
    return key


def _bearer(authorization: str | None) -> str:
    scheme, _, key = (authorization or "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, key: str | None) -> bool:
    # Digests have one length, so that the comparison does not tell the key's either.
    digests = [hashlib.sha256(text.encode("utf-8", "replace")).digest() for text in (given, key or "")]
    return hmac.compare_digest(*digests) and key is not None


def _unauthorised(message: str) -> Refusal:
    return Refusal(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
