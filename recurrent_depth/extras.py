"""Optional packages and modules of the user."""

import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

from recurrent_depth.errors import UserError


class MissingPackageError(UserError):
    """A command needs a package that is not installed."""


def require(package: str, install: str, what: str) -> None:
    """Raise unless a package is installed.

    Args:
        package: name of the module, for example `datatrove`.
        install: what pip installs, for example `recurrent-depth[data]`.
        what: the option or feature that needs the package.
    """
    if find_spec(package) is None:
        raise MissingPackageError(f"{what} needs the package {package}, which is missing; run pip install '{install}'")


def package_version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed, as this one in a plain checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def import_own(name: str) -> ModuleType:
    """Import a module of the user, which may be in the current folder. Raises what its code raises."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return import_module(name)
