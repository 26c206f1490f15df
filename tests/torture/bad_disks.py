"""Writers on disks that are full or read-only: an error in one sentence, the output before stays, the next run goes on.

A disk is a small one in memory, which only root may mount, in a mount namespace that ends with this process. Others
get a limit of the size of files instead.
"""

import ctypes
import os
import random
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from deepseek_latent import LatentCache
from tests.support import random_ids

from .campaign import Campaign, is_refusal
from .writers import (
    CommandRefused,
    Snapshot,
    Writer,
    all_writers,
    make_inputs,
    prompts,
    run_forked,
    small_model,
    snapshot,
    visible,
)

PAGE, ROOM = 4096, 10**8
REFUSED = 2
NEW_NAMESPACE, PRIVATE, READ_ONLY, REMOUNT, DETACH = 0x20000, 0x44000, 1, 32, 2
libc = ctypes.CDLL(None, use_errno=True)


def run(campaign: Campaign) -> None:
    torch.set_num_threads(1)
    mounts = libc.unshare(NEW_NAMESPACE) == 0 and libc.mount(None, b"/", None, PRIVATE, None) == 0
    with tempfile.TemporaryDirectory() as work:
        inputs, disk = Path(work, "inputs"), Path(work, "disk")
        disk.mkdir()
        run_forked(partial(make_inputs, inputs))
        writers = all_writers(inputs)
        if mounts:
            mount(disk, ROOM)
            read_where_nothing_can_be_written(disk, campaign)
            libc.umount2(os.fsencode(disk), DETACH)
        for chance in campaign.cases():
            writer = writers[campaign.case % len(writers)]
            kind = chance.choice([full_disk, read_only_disk, small_files] if mounts else [small_files])
            if mounts:
                mount(disk, ROOM)
            try:
                try_disk(kind, writer, disk, campaign, chance)
            finally:
                if mounts:
                    libc.umount2(os.fsencode(disk), DETACH)


def try_disk(kind: Callable, writer: Writer, disk: Path, campaign: Campaign, chance: random.Random) -> None:
    disk_of_kind, box = kind.__name__.replace("_", " "), disk / "box"
    what = f"{writer.name}, {disk_of_kind}"
    before, after = prepare(writer, box)
    status, printed = kind(writer, box, before, after, chance)
    found = snapshot(box)
    if status == 0:
        campaign.count("accepted")
    elif status == REFUSED and re.search(r"could not be written|writ(e|ten) to", printed):
        campaign.count(f"refused, {disk_of_kind}")
        kept = [name for name in found if re.search(r"\.partial/.*tensors$", name)]
        campaign.count("finished shards kept", len(kept))
    else:
        campaign.finding("raw exception", f"{what}: {printed[-500:]}")
    if visible(found) != visible(after if status == 0 else before):
        campaign.finding("half output", f"{what}: it left {', '.join(visible(found)) or 'nothing'}")
    if status:
        status, printed = run_forked(partial(attempt, writer, box))
        if status or snapshot(box) != after:
            other = ", ".join(snapshot(box).keys() ^ after.keys())
            campaign.finding("wrong answer", f"{what}: with room, the next run gives {other} {printed[-300:]}")
    shutil.rmtree(box)


def prepare(writer: Writer, box: Path) -> tuple[Snapshot, Snapshot]:
    """Makes the box, and returns what it holds before and after the writer runs with room."""
    box.mkdir()
    if writer.before:
        run_forked(partial(writer.before, box))
    before, kept = snapshot(box), box.with_name("kept")
    shutil.copytree(box, kept, symlinks=True)
    run_forked(partial(attempt, writer, box))
    after = snapshot(box)
    shutil.rmtree(box)
    kept.rename(box)
    return before, after


def full_disk(writer: Writer, box: Path, before: Snapshot, after: Snapshot, chance: random.Random) -> tuple[int, str]:
    # a size of 0 would be no limit
    room = pages(before) + chance.randint(1, pages(after) + 2)
    mount(box.parent, room * PAGE, REMOUNT)
    try:
        return run_forked(partial(attempt, writer, box))
    finally:
        mount(box.parent, ROOM, REMOUNT)


def read_only_disk(writer: Writer, box: Path, *_) -> tuple[int, str]:
    mount(box.parent, ROOM, REMOUNT | READ_ONLY)
    try:
        return run_forked(partial(attempt, writer, box))
    finally:
        mount(box.parent, ROOM, REMOUNT)


def small_files(writer: Writer, box: Path, before: Snapshot, after: Snapshot, chance: random.Random) -> tuple[int, str]:
    """The system says the same way that a file would be too large as that a disk is full, by an error of `write`."""
    limit = chance.randint(0, max(len(content or b"") for content in after.values()))

    def action() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return attempt(writer, box)

    return run_forked(action)


def read_where_nothing_can_be_written(disk: Path, campaign: Campaign) -> None:
    model, ids = small_model(), random_ids(1, 70)
    with torch.no_grad():
        cache = model(ids, cache=LatentCache(model.config)).cache
    cache.save(disk / "cache", tokens=ids, model=model)
    prompts(disk).store(cache, ids, model)
    mount(disk, ROOM, REMOUNT | READ_ONLY)
    with campaign.judged("LatentCache.load from a read-only disk", refusals=(), seconds=20):
        assert LatentCache.load(disk / "cache", model=model).get_seq_length() == 70
    with campaign.judged("PromptCache.load from a read-only disk", refusals=(), seconds=20):
        assert prompts(disk).load(ids, model).get_seq_length() == 69


def attempt(writer: Writer, box: Path) -> int:
    try:
        writer.write(box)
    except CommandRefused:
        return REFUSED
    except OSError as error:
        if not is_refusal(error, (OSError,)):
            raise
        print(error)
        return REFUSED
    return 0


def pages(content: Snapshot) -> int:
    return sum(-(-len(data) // PAGE) for data in content.values() if data)


def mount(disk: Path, size: int, flags: int = 0) -> None:
    if libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", flags, b"size=%d" % size) != 0:
        raise OSError(ctypes.get_errno(), f"{disk} could not be mounted")
