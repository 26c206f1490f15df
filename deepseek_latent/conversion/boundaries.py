"""Which files a conversion may read, copy, replace and remove, since strangers may have made its source.

A conversion reads regular files inside its source. It leaves a list of the files that it wrote, `conversion.json`, in
its folder. `--force` replaces a folder that holds these files, unchanged, and nothing else. While the folder is not
finished, the same file says which conversion can continue it.
"""

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..json_files import read_json
from ..whole_files import save_text, whole_file

MARKER = "conversion.json"
_ABOUT = (
    "written by deepseek-latent convert, whose --force replaces this folder while it holds these files, each with its "
    "size in bytes and its time of change in seconds"
)


def file_inside(folder: Path, name: str) -> Path:
    """The regular file `name` of a source, without links in its path.

    A link may lead to a file in the folder, or as in the cache of the hub from models--NAME/snapshots/REVISION to
    models--NAME/blobs. Any other link could put a file that the user keeps elsewhere into a published checkpoint.

    Raises ValueError for anything else.
    """
    root = Path(os.path.realpath(folder))
    try:
        real = Path(os.path.realpath(root / name, strict=True))
        mode = real.stat().st_mode
    except OSError as error:
        raise ValueError(f"{name!r} in {folder} cannot be read ({error.strerror}); remove it or restore it.") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{name!r} in {folder} is not a regular file; remove it or put a file there.")
    caches = [x.parent for x in root.parents if x.name == "snapshots" and x.parent.name.startswith("models--")]
    if root not in real.parents and real.parent not in [cache / "blobs" for cache in caches]:
        raise ValueError(
            f"{name!r} in {folder} is a link to {real}, outside of the folder; put the file itself there if it belongs "
            "to the checkpoint."
        )
    return real


def check_out(out: Path, *, force: bool, replace_any_folder: bool) -> None:
    """Raises ValueError if `out` is a folder that is not empty and may not be replaced.

    `force` replaces what a conversion wrote, and with `replace_any_folder` any folder but one that holds the user's
    home.
    """
    if not os.path.lexists(out) or not os.listdir(out):
        return
    if not force:
        raise ValueError(f"{out} exists; choose another folder, or --force to replace it if a conversion wrote it.")
    # a user without a home has none to lose
    with suppress(RuntimeError):
        if Path.home().resolve().is_relative_to(out):
            raise ValueError(f"{out} holds {Path.home()} and is not replaced; choose another folder.")
    if not replace_any_folder and (reason := _foreign_content(out)):
        raise ValueError(
            f"--force replaces only what a conversion wrote, and {out} {reason}; choose another folder, or add "
            "--replace-any-folder to remove everything in it."
        )


def write_marker(folder: Path, plan: str, names: Iterable[str] = ()) -> None:
    """Lists the named files of a folder, so that a later conversion may replace it.

    `plan` identifies the conversion, so that it can continue while the folder is not finished.
    """
    written = {name: _size_and_date(folder / name) for name in sorted(names)}
    text = json.dumps({"about": _ABOUT, "plan": plan, "files": written}, indent=1)
    with whole_file(folder / MARKER) as place:
        save_text(place, text + "\n")


def plan_of(folder: Path) -> str | None:
    """The plan of the conversion that wrote to a folder, or None."""
    with suppress(ValueError):
        return read_json(folder / MARKER).get("plan")
    return None


def _foreign_content(folder: Path) -> str | None:
    """What in a folder no conversion wrote, or None."""
    written = None
    with suppress(ValueError):
        written = read_json(folder / MARKER).get("files")
    if not isinstance(written, dict):
        return f"has no list of its files ({MARKER})"
    for name in sorted(os.listdir(folder)):
        if name == MARKER:
            continue
        if name not in written:
            return f"holds {name}, which no conversion wrote"
        if not _is_plain(folder / name) or _size_and_date(folder / name) != written[name]:
            return f"holds {name}, which was changed after the conversion"
    return None


def _size_and_date(path: Path) -> list[int]:
    # whole seconds, because not every file system keeps fractions
    return [path.lstat().st_size, int(path.lstat().st_mtime)]


def refuse_planted(path: Path, is_kind: Callable[[int], bool]) -> None:
    """Raises ValueError if a hidden place beside OUT is taken by anything that no conversion of this user left there.

    A link would lead what is written or emptied there to another place. `is_kind` is a function of the module stat.
    """
    if not os.path.lexists(path):
        # a name that is too long is an OSError now, and not after the work
        with suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
        return
    status = path.lstat()
    is_shared = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
    if not is_kind(status.st_mode) or is_shared or status.st_uid != os.geteuid():
        raise ValueError(f"{path} is in the way, and no conversion of yours left it there; look at it and remove it.")


def _is_plain(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def copy_file(source: Path, place: Path) -> None:
    """Copies a file of a source, read as `file_inside` allows, into a new one with the permissions of any new file."""
    # a link that was put there in the meantime is not followed
    handle = os.open(file_inside(source.parent, source.name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(handle, "rb") as stored:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(f"{source} changed while it was read; start again.")
        place.unlink(missing_ok=True)
        with open(place, "xb") as copy:
            shutil.copyfileobj(stored, copy)
