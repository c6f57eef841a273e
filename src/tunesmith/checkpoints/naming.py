"""Names of runs and tags of tuned models."""

import getpass
import re
import secrets
import string
from datetime import datetime
from pathlib import Path

from tunesmith.errors import OutputError
from tunesmith.storage.urls import is_url

_LONGEST_NAME = 160  # of a model within a run's name: file systems take 255 bytes


def model_tag(model_id: str) -> str:
    """``{model}:{user, 5 letters}:{5 random letters}``, as LLMForge; never fails for a missing variable."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # no variable, and no entry for this user id
        user = "user"
    letters = re.sub(r"[^a-z0-9]", "", user.lower())[:5]
    return f"{short_model_name(model_id)}:{letters.ljust(5, 'x')}:{random_letters()}"


def short_model_name(model_id: str) -> str:
    """A hub id or catalog name as it is; of a folder or URL its last name, with only safe characters."""
    if is_url(model_id):
        model_id = model_id.rstrip("/").rpartition("/")[2]
    try:
        path = Path(model_id).expanduser()
        name = path.resolve().name if path.is_dir() else model_id
    except (OSError, RuntimeError, ValueError):  # no possible path: too long, "~nobody", a null character
        name = model_id
    return re.sub(r"[^A-Za-z0-9._/-]", "-", name) or "model"


def new_run_folder(output_dir: Path, model_id: str, method: str, now: datetime) -> Path:
    """Make ``{output_dir}/{model}-{method}-{time}-{letters}``, a folder no other run has.

    Raises:
        OutputError: it cannot be made.
    """
    model = short_model_name(model_id).replace("/", "--")[:_LONGEST_NAME]
    folder = output_dir / f"{model}-{method}-{now:%Y%m%d-%H%M%S}-{random_letters()}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            str(output_dir),
            f"cannot be written ({error.strerror})",
            "set output_dir to a folder you can write",
        ) from error
    return folder


def random_letters(count: int = 5) -> str:
    """Lower-case letters that no seed decides: two runs of one file must not share a name."""
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(count))
