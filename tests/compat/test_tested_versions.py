"""There is a warning for each library whose version is outside the tested range, and no other warning."""

import subprocess
import sys
import warnings
from importlib import metadata

import pytest

from deepseek_latent.compat import tested_versions
from deepseek_latent.compat.tested_versions import warn_of_untested_versions


@pytest.fixture
def installed(monkeypatch):
    """Versions that take the place of those that are installed."""
    replaced = {}
    monkeypatch.setattr(tested_versions, "version", lambda name: replaced.get(name) or metadata.version(name))
    return replaced


@pytest.mark.parametrize(
    ("name", "version"), [("transformers", "5.25.0"), ("transformers", "5.16.1"), ("peft", "0.22.0")]
)
def test_a_version_outside_is_named_with_the_range_and_what_to_do(installed, name, version):
    installed[name] = version
    with pytest.warns(UserWarning, match=rf"tested with {name}.*, and {version} is installed.*open an issue"):
        warn_of_untested_versions()


@pytest.mark.parametrize("version", ["5.24.0", "5.24.3", "5.17.0", "5.24.1.dev0"])
def test_a_version_inside_gives_no_warning(installed, version):
    installed["transformers"] = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_versions()


def test_a_library_that_is_not_installed_is_named_without_an_error(monkeypatch):
    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(tested_versions, "version", version)
    with pytest.warns(UserWarning, match="tested with peft.*, and none is installed"):
        warn_of_untested_versions()


def test_a_package_that_is_not_installed_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_versions("no-such-package-as-this")


def test_the_warning_comes_before_a_missing_name_ends_the_import():
    program = """
import sys, types, importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: "4.57.3" if name == "transformers" else real(name)
sys.modules["transformers"] = types.ModuleType("transformers")
import deepseek_latent
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.index("and 4.57.3 is installed") < done.stderr.index("ImportError")
