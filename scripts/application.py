"""The application in a folder of its own: what Flower bundles of it, and what tells it to.

``flwr run`` looks at every file below the folder that it is given, whatever ``.gitignore`` says: in a checkout
also at the 60,000 of the environment in .venv, which takes several seconds.
"""

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

from .processes import CHECKOUT

_SETTINGS = ("/pyproject.toml", "/.gitignore")


def copy_application(folder: Path, replaced: Mapping[str, str] | None = None, checkout: Path = CHECKOUT) -> Path:
    """Copy what ``fab-include`` of a checkout's pyproject.toml names, that file itself, and .gitignore.

    Args:
        folder: a new one; Flower allows letters, digits and hyphens in its name.
        replaced: other texts for some files, by their paths in the folder.
        checkout: the application's folder.

    Raises:
        ValueError: ``fab-include`` has a pattern that is not of files from the root on: it may match anywhere.
    """
    settings = checkout / "pyproject.toml"
    for pattern in (*_SETTINGS, *tomllib.loads(settings.read_text())["tool"]["flwr"]["app"]["fab-include"]):
        if not pattern.startswith("/") or pattern.endswith("/"):
            raise ValueError(
                f"{settings}: fab-include has {pattern!r}; allowed: patterns of files that begin with /"
            )
        for path in checkout.glob(pattern.removeprefix("/")):
            if path.is_symlink():  # nor does Flower take them
                continue
            copy = folder / path.relative_to(checkout)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    for name, text in (replaced or {}).items():
        (folder / name).write_text(text)
    return folder
