"""A version of another library outside of the tested range is warned of, and nothing else is."""

import subprocess
import sys
import warnings
from importlib import metadata

import pytest

from deepseek_latent.compat import tested_versions
from deepseek_latent.compat.tested_versions import warn_of_untested_versions


@pytest.fixture
def installed(monkeypatch):
    """Versions that are pretended to be installed, over those that are."""
    pretended = {}
    monkeypatch.setattr(tested_versions, "version", lambda name: pretended.get(name) or metadata.version(name))
    return pretended


@pytest.mark.parametrize(
    ("name", "version"), [("transformers", "5.25.0"), ("transformers", "5.16.1"), ("peft", "0.22.0")]
)
def test_what_is_outside_is_named_with_the_range_and_what_to_do(installed, name, version):
    installed[name] = version
    with pytest.warns(UserWarning, match=rf"tested with {name}.*, and {version} is installed.*open an issue"):
        warn_of_untested_versions()


@pytest.mark.parametrize("version", ["5.24.0", "5.24.3", "5.17.0", "5.24.1.dev0"])
def test_what_is_inside_is_not_warned_of(installed, version):
    installed["transformers"] = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_versions()


def test_what_is_not_installed_is_named_and_ends_nothing(monkeypatch):
    def version(name):
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(tested_versions, "version", version)
    with pytest.warns(UserWarning, match="tested with peft.*, and none is installed"):
        warn_of_untested_versions()


def test_of_a_package_that_is_not_installed_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_versions("no-such-package-as-this")


def test_it_is_said_before_a_missing_name_ends_the_import():
    program = """
import sys, types, importlib.metadata as metadata
real = metadata.version
metadata.version = lambda name: "4.57.3" if name == "transformers" else real(name)
sys.modules["transformers"] = types.ModuleType("transformers")
import deepseek_latent
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    said = done.stderr
    assert said.index("and 4.57.3 is installed") < said.index("ImportError")
