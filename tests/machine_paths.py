"""Whether a text that is shipped names a place of the machine it was made on."""

# Where homes, mounts and temporary files lie on the systems that results are made on.
_FOLDERS = ("home", "root", "tmp", "mnt", "work", "Users", "private")


def places_in(text: str) -> list[str]:
    """The beginnings of such places that stand in ``text``."""
    return [place for folder in _FOLDERS if (place := f"/{folder}/") in text]
