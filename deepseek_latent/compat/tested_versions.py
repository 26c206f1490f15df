"""Warns about libraries in versions that this package was not tested with.

Importing this module warns at once, before an import of such a library may fail.
"""

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def warn_of_untested_versions(package: str = "deepseek-latent") -> None:
    """Warns once if a requirement of `package` is installed in a version outside its range, or not at all.

    pip keeps to these ranges, so someone has overridden them. If the package itself is not installed, as with a
    checkpoint's own code, its requirements are unknown and there is no warning.
    """
    try:
        requirements = [Requirement(text) for text in requires(package) or ()]
    except PackageNotFoundError:
        return
    # requirements with a marker belong to extras, which need not be installed
    required = [requirement for requirement in requirements if requirement.marker is None]
    found = {requirement: _installed(requirement.name) for requirement in required}
    outside = [
        f"{requirement.name}{requirement.specifier}, and {found[requirement] or 'none'} is installed"
        for requirement in required
        if found[requirement] is None or not requirement.specifier.contains(found[requirement], prereleases=True)
    ]
    if outside:
        warnings.warn(
            f"{package} was tested with {'; '.join(outside)}. If something fails, install a version in that range, or "
            f"open an issue for {package} with the traceback and the output of `pip list`.",
            stacklevel=2,
        )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


warn_of_untested_versions()
