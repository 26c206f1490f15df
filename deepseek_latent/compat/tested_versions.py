"""Says where another library is installed in a version that this package was not tested with.

It does so when it is imported, before what is imported after it may fail of that version.
"""

import warnings
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def warn_of_untested_versions(package: str = "deepseek-latent") -> None:
    """Warns once if a requirement of `package` is installed in a version outside of its range.

    pip keeps to the range, so somebody has forced another one. Where the package itself is not installed, as in a
    checkpoint's own code, nothing is known and nothing said.
    """
    try:
        requirements = [Requirement(text) for text in requires(package) or ()]
    except PackageNotFoundError:
        return
    # of an extra, only what is asked for is installed
    wanted = [requirement for requirement in requirements if requirement.marker is None]
    found = {requirement: _installed(requirement.name) for requirement in wanted}
    outside = [
        f"{requirement.name}{requirement.specifier}, and {found[requirement] or 'none'} is installed"
        for requirement in wanted
        if found[requirement] is None or not requirement.specifier.contains(found[requirement], prereleases=True)
    ]
    if outside:
        warnings.warn(
            f"{package} was tested with {'; '.join(outside)}. If something fails, install a version of that range, or "
            f"open an issue of {package} with the traceback and what `pip list` prints.",
            stacklevel=2,
        )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


warn_of_untested_versions()
