"""Where a checkpoint is: in a folder, or on the hub, from which it is downloaded."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from .progress import announce_without_terminal

# a name that ends so is that of a file, also where the hub would allow it
_SUFFIXES_OF_FILES = (".json", ".gguf", ".safetensors")


def local_or_hub(source: str) -> Path | str:
    """A path if it exists, else the hub id. Raises ValueError for a path that does not exist.

    A hub id is OWNER/NAME here, as all models are that this package reads. If OWNER is a folder, NAME was mistyped.
    """
    # unlike that of Path, it leaves the ~ of an unknown user
    path = Path(os.path.expanduser(source))
    if path.exists():
        return path
    if not _can_be_hub_id(source):
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise ValueError(
            f"expected a folder or a hub id (OWNER/NAME), got {source}, which does not exist{place}; correct the name."
        )
    return source


def folder_or_hub(source: str) -> Path | str:
    """As `local_or_hub`, and raises ValueError for a file, such as a config.json."""
    place = local_or_hub(source)
    if isinstance(place, Path) and not place.is_dir():
        raise ValueError(f"expected a folder with a checkpoint, got the file {place}; name its folder, {place.parent}.")
    return place


def _can_be_hub_id(source: str) -> bool:
    owner, _, name = source.partition("/")
    if not name or "/" in name or source.endswith(_SUFFIXES_OF_FILES) or os.path.isdir(os.path.expanduser(owner)):
        return False
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def download(hub_id: str, patterns: list[str]) -> Path:
    """The folder with the files of a hub id whose names match one of the patterns.

    Raises ValueError if the hub does not have it, and if it is not reached. Then `snapshot_download` says so at once,
    where `hf_hub_download` tries again for 23 seconds.
    """
    announce_without_terminal(f"looking for {hub_id} on the hub")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except OSError as error:
        if error.errno is not None:
            # of the system, such as a full disk
            raise
        raise ValueError(
            f"expected a folder or a hub id, got {hub_id}: there is no such folder in {Path.cwd()}, and "
            f"{_why_not_downloaded(error)}."
        ) from error


def _why_not_downloaded(error: OSError) -> str:
    if isinstance(error, GatedRepoError):
        return "its owner has to give you access on the hub; ask for it there, then run hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub does not have it either, or it is private; correct the name, or run hf auth login"
    # the text of these errors is long, and its cause is that of the HTTP library
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        # too many requests from here, or a fault of the hub
        advice = "try again later" if status == 429 or status >= 500 else "correct the name, or run hf auth login"
        return f"the hub answered with status {status}; {advice}"
    return f"the hub was not reached ({type(cause).__name__}); correct the name, or try again online"
