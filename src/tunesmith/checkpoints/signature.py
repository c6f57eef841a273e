"""Detached Ed25519 signatures (RFC 8032): a file is by whom it claims to be, for those who configure keys.

The signature of ``tunesmith.json`` lies beside it in ``tunesmith.json.sig``, one line of base64. As the manifest
lists every other file with its SHA-256, this one signature covers the whole checkpoint. The environment names
files with keys, never a key itself, and no message repeats what was put there by mistake.
"""

import base64
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.checkpoints.atomic import REAL, FileOps, write_text
from tunesmith.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNING_KEY = "TUNESMITH_SIGNING_KEY"
VERIFY_KEY = "TUNESMITH_VERIFY_KEY"
_ANOTHER = f"use a checkpoint signed by that key, or unset {VERIFY_KEY}"


def signature_of(file: Path) -> Path:
    """Where the signature of ``file`` lies."""
    return file.with_name(f"{file.name}.sig")


def check_keys() -> None:
    """Find out before hours of training whether the keys can be used, and what is saved will be loaded again.

    Raises:
        ConfigError: a key cannot be read, or a run would leave checkpoints that are refused here.
    """
    signing, verifying = _signing_key(), _verify_key()
    if verifying is None:
        return
    if signing is None:
        raise ConfigError(
            VERIFY_KEY,
            "asks for signatures, and this run would leave checkpoints without one",
            f"name the private key's file in {SIGNING_KEY}, or unset {VERIFY_KEY}",
        )
    if signing.public_key() != verifying:
        fault = f"is not the public key of {SIGNING_KEY}, so this run's checkpoints would be refused"
        raise ConfigError(VERIFY_KEY, fault, "name the two halves of one key")


def sign(file: Path, *, fs: FileOps = REAL) -> None:
    """Sign ``file`` where a signing key is configured; else only take away the signature of what it replaced.

    Raises:
        ConfigError: the key cannot be used.
        CheckpointError, OutputError: as ``write_text``.
    """
    key, at = _signing_key(), signature_of(file)
    if key is not None:
        write_text(at, base64.b64encode(key.sign(file.read_bytes())).decode() + "\n", fs=fs)
    elif at.exists():
        fs.remove(at)


def check_signature(file: Path, content: bytes) -> None:
    """Refuse ``file`` unless its signature is by the configured key; without a configured key accept all.

    Args:
        file: names the place.
        content: its bytes as they were read, so that what is checked is what is used.

    Raises:
        CheckpointError: there is no signature, or not that key's over these bytes.
        ConfigError: the key cannot be used.
    """
    key = _verify_key()
    if key is None:
        return
    from cryptography.exceptions import InvalidSignature

    at = signature_of(file)
    try:
        key.verify(base64.b64decode(at.read_bytes().strip(), validate=True), content)
    except FileNotFoundError as error:
        fault = f"is not signed (no {at.name} in it), and {VERIFY_KEY} asks for signatures"
        raise CheckpointError(str(file.parent), fault, _ANOTHER) from error
    except (OSError, ValueError) as error:  # base64's own error is a ValueError
        raise CheckpointError(str(at), "cannot be read as a signature", _ANOTHER) from error
    except InvalidSignature as error:
        fault = f"its {file.name} was changed, or signed by another key than the one that {VERIFY_KEY} names"
        raise CheckpointError(str(file.parent), fault, _ANOTHER) from error


def refuse_unsigned(folder: Path, reason: str) -> None:
    """Refuse a folder that cannot be signed, where a key is configured: else taking a manifest away would do.

    Raises:
        CheckpointError: a key to verify with is configured.
    """
    if os.environ.get(VERIFY_KEY):
        fault = f"is not signed ({reason}), and {VERIFY_KEY} asks for signatures"
        raise CheckpointError(str(folder), fault, _ANOTHER)


def carry_signature(source: Path, copy: Path, *, fs: FileOps = REAL) -> None:
    """Give the file ``copy`` the signature of ``source``, where it has none of its own and equals it byte for byte.

    Raises:
        OSError: it cannot be copied.
    """
    signature, at = signature_of(source), signature_of(copy)
    if signature.is_file() and not at.exists() and source.read_bytes() == copy.read_bytes():
        fs.copy_file(signature, at)


def _signing_key() -> "Ed25519PrivateKey | None":
    data = _pem(SIGNING_KEY)
    if data is None:
        return None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key: object = None
    try:
        with suppress(ValueError, UnsupportedAlgorithm):
            key = load_pem_private_key(data, password=None)
    except TypeError as error:  # so the library says that a password is missing
        fault = "names a key file with a password"
        raise ConfigError(SIGNING_KEY, fault, "name one without, readable by you alone") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_key(SIGNING_KEY, "private", "openssl genpkey -algorithm ed25519 -out signing.pem")
    return key


def _verify_key() -> "Ed25519PublicKey | None":
    data = _pem(VERIFY_KEY)
    if data is None:
        return None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: object = None
    with suppress(ValueError, UnsupportedAlgorithm):
        key = load_pem_public_key(data)
    if not isinstance(key, Ed25519PublicKey):
        raise _other_key(VERIFY_KEY, "public", "openssl pkey -in signing.pem -pubout -out verify.pem")
    return key


def _pem(variable: str) -> bytes | None:
    """The content of the file that ``variable`` names; None where it is not set."""
    name = os.environ.get(variable)
    if not name:
        return None
    path = Path(name)
    try:
        # What names no file may be a key that was put there by mistake: it is not repeated.
        found = path.expanduser().is_file()
    except (OSError, RuntimeError, ValueError):  # too long for a name, "~nobody", a null character
        found = False
    if not found:
        raise ConfigError(variable, "names no file", "give the path of a PEM file, not the key itself")
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        remedy = "run: pip install 'tunesmith[sign]'"
        raise ConfigError(variable, "is set, but cryptography is not installed", remedy) from error
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(variable, f"{name} cannot be read ({error.strerror})", "check its owner") from error


def _other_key(variable: str, half: str, command: str) -> ConfigError:
    return ConfigError(variable, f"names a file that is no Ed25519 {half} key in PEM", f"make one: {command}")
