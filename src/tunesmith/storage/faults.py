"""What goes wrong at a store: whether another try may help, and how to say it in one line.

Every driver has exceptions of its own, and not all drivers are installed: most are known by name, code or status.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.errors import TunesmithError, UserError
from tunesmith.storage.urls import protocol_of, shown

_MOST_TEXT = 200
_PASSING_STATUS = (408, 425, 429)
_LASTING = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError, ImportError,
    ValueError, TypeError, LookupError, AttributeError, NotImplementedError, AssertionError,
)  # fmt: skip
# EINVAL and ENOSYS are what s3fs makes of requests that the store refuses; the others are faults of this disk.
_LASTING_CODES = {
    errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT, errno.EROFS,
    errno.EFBIG, errno.EMFILE,
}  # fmt: skip
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "NoAuthTokenError",
    "ProfileNotFound", "TokenRetrievalError", "UnauthorizedSSOTokenError", "DefaultCredentialsError",
    "RefreshError", "LocalTokenNotFoundError",
}  # fmt: skip
_REFUSED_REQUEST = {
    "ParamValidationError",
    "UnknownServiceError",
    "InvalidEndpointDiscoveryConfigurationError",
}
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL|CONNECTION_STRING|(?:\A|_)SAS(?:_|\Z)", re.I)
# Stores answer with addresses that are keys in themselves, for some hours.
_SIGNED = re.compile(r"(https?://[^\s?'\"<>]+)\?[^\s'\"<>]+", re.I)


@dataclass(frozen=True)
class _Driver:
    """How to install what reaches a store, and which variables say who asks."""

    install: str
    variables: str


_S3 = _Driver("pip install 'tunesmith[s3]'", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
_GS = _Driver("pip install 'tunesmith[gs]'", "GOOGLE_APPLICATION_CREDENTIALS")
_DRIVERS = {
    "s3": _S3, "s3a": _S3, "gs": _GS, "gcs": _GS,
    "hf": _Driver("pip install huggingface_hub", "HF_TOKEN"),
    "az": _Driver("pip install adlfs", "AZURE_STORAGE_CONNECTION_STRING"),
    "abfs": _Driver("pip install adlfs", "AZURE_STORAGE_CONNECTION_STRING"),
    "abfss": _Driver("pip install adlfs", "AZURE_STORAGE_CONNECTION_STRING"),
}  # fmt: skip


class TornTransfer(OSError):
    """Fewer or more bytes came than were asked for."""


def is_passing(error: Exception) -> bool:
    """Whether the same request may go well a little later: the line broke, the store is busy or out of order."""
    if isinstance(error, TornTransfer):
        return True
    if isinstance(error, (TunesmithError, *_LASTING)) or _names(error) & (_NO_CREDENTIALS | _REFUSED_REQUEST):
        return False
    if isinstance(error, OSError) and error.errno in _LASTING_CODES:
        return False
    status = _status(error)
    return status is None or not 400 <= status < 500 or status in _PASSING_STATUS


@contextmanager
def told(url: str, kind: type[UserError]) -> Iterator[None]:
    """Turn what a driver raises into the error ``kind``, one line that names ``url``; errors of ours pass."""
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:
        raise kind(shown(url), *explained(error, url)) from error


def explained(error: Exception, url: str) -> tuple[str, str]:
    """Fault and remedy. What secrets the environment holds never appears in them."""
    driver = _DRIVERS.get(protocol_of(url))
    names, status = _names(error), _status(error)
    own = driver.variables if driver else "the variables that its driver reads"
    if isinstance(error, ImportError):
        return "needs a package that is not installed", f"run: {_install(url)}"
    if names & _NO_CREDENTIALS:
        return "no credentials were found", f"set {own} in the environment"
    if "Protocol not known" in str(error):
        return f"no store is known by {protocol_of(url)}://", "check the address"
    if isinstance(error, FileNotFoundError) or status == 404:
        if is_about_bucket(error):
            elsewhere = ", and AWS_ENDPOINT_URL_S3 where it is not at AWS" if driver is _S3 else ""
            return "there is no such bucket", f"check its name{elsewhere}"
        return "not found", "check the address"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"permission denied ({_text(error)})", f"check {own} and the rights that go with them"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space left on this machine for the copy", "make room"
    return f"cannot be reached ({_text(error)})", "check the address and the network, and try again"


def is_about_bucket(error: Exception) -> bool:
    """Whether it is not the file that is missing but the bucket: S3 and GCS have an answer of their own for that."""
    # Of Google's answer gcsfs tells no more than the address: that of a bucket's list, and not of a file.
    return (
        re.search(r"\bNoSuchBucket\b|\bspecified bucket does not exist\b|\Ab/[^/]+/o\Z", str(error))
        is not None
    )


def _install(url: str) -> str:
    driver = _DRIVERS.get(protocol_of(url))
    if driver is not None:
        return driver.install
    from fsspec.registry import known_implementations

    hint = known_implementations.get(protocol_of(url), {}).get("err", "")
    package = re.search(r"(?i)(?:\binstall (?:the )?|requires )[\"']?([\w-]+)", hint)
    return f"pip install {package[1]}" if package else "pip install the fsspec driver of this kind of URL"


def _names(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of aiohttp, gcsfs, requests, httpx or botocore carries."""
    response = getattr(error, "response", None)
    found = [
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
    ]
    if isinstance(response, dict):
        found.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return next((int(value) for value in found if isinstance(value, int) and 100 <= value < 600), None)


def _text(error: Exception) -> str:
    text = _SIGNED.sub(r"\1", str(error))
    secrets = [value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)]
    for secret in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, "***")
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else " " for c in text)[:_MOST_TEXT]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
