"""Kills every writer before each of its file operations and in the middle of each file, and looks at what is left.

Under its name must be the output before, complete, or the new one, bit for bit. Then the same writer runs again, must
succeed, and leave what an undisturbed run leaves, and nothing else.
"""

import functools
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from deepseek_latent import whole_files

from .campaign import Campaign
from .writers import Snapshot, Writer, all_writers, make_inputs, put_back, run_forked, snapshot, visible

# events of Python's audit hooks for operations that change a folder; opening for writing is looked at more closely
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
CHANGES |= {"os.utime"}
NEVER = 10**9


class Point(NamedTuple):
    writer: Writer
    template: Path
    before: Snapshot
    after: Snapshot
    operation: int


def run(campaign: Campaign) -> None:
    torch.set_num_threads(1)
    # in memory if possible, because processes that are killed need no disk, and a disk is slow to flush
    in_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=in_memory) as work:
        inputs, work = Path(work, "inputs"), Path(work)
        run_forked(partial(make_inputs, inputs))
        writers = all_writers(inputs)
        for chance in campaign.cases():
            # the writers take turns, and each goes through all of its points in an order of its own
            turn, number = divmod(campaign.case, len(writers))
            points = points_of(writers[number], work, campaign)
            if points:
                campaign.count("different kill points", int(turn < len(points)))
                try_point(points[turn % len(points)], work, campaign, chance)


@functools.cache
def points_of(writer: Writer, work: Path, campaign: Campaign) -> list[Point]:
    """Runs a writer undisturbed, and returns one point per file operation, in a random order."""
    template, box = work / "templates" / writer.name, work / "box"
    box.mkdir()
    if writer.before:
        # at the same place, because the same conversion to another place is not resumed
        run_forked(partial(writer.before, box))
    before = snapshot(box)
    shutil.copytree(box, template, symlinks=True)
    operations = Operations(NEVER, random.Random(0), writer)
    status, printed = run_forked(partial(operations.count_in, box, told=True))
    after = snapshot(box)
    shutil.rmtree(box)
    if status or len(visible(after)) == 0:
        campaign.finding("wrong answer", f"{writer.name}: an undisturbed run ended with {status}: {printed[-300:]}")
        return []
    if left := sorted(after.keys() - visible(after).keys() - {"prompts/.lock"}):
        campaign.finding("half output", f"{writer.name}: an undisturbed run leaves {', '.join(left)}")
    points = [Point(writer, template, before, after, i) for i in range(int(printed.split()[-1]))]
    random.Random(campaign.seed).shuffle(points)
    return points


def try_point(point: Point, work: Path, campaign: Campaign, chance: random.Random) -> None:
    writer, box = point.writer, work / "box"
    what = f"{writer.name}, killed at operation {point.operation}"
    shutil.copytree(point.template, box, symlinks=True)
    operations = Operations(point.operation, chance, writer)
    status, printed = run_forked(partial(operations.count_in, box))
    found, before, after = visible(snapshot(box)), visible(point.before), visible(point.after)
    campaign.count(f"of {writer.name.partition(',')[0].partition(' over')[0]}")
    if status != -signal.SIGKILL:
        campaign.finding("wrong answer", f"{what}: it was not killed but ended with {status}: {printed[-300:]}")
    if not writer.exchanges and not found and before:
        campaign.count("moments without a folder, where a disk cannot exchange two")
        put_back(writer, box)
        found = visible(snapshot(box))
    if not writer.is_whole(found, before, after):
        campaign.finding("half output", f"{what}: {differences(found, before)} from before")
    elif found != after or writer.replaces:
        check_again(point, box, what, campaign)
    else:
        # it refuses to write again, so what a killed process leaves is hidden and empty
        left = {name: data for name, data in snapshot(box).items() if name not in point.after}
        if any(left.values()):
            campaign.finding("half output", f"{what}: it left {', '.join(left)}")
    shutil.rmtree(box)


def check_again(point: Point, box: Path, what: str, campaign: Campaign) -> None:
    operations = Operations(NEVER, random.Random(0), point.writer)
    status, printed = run_forked(partial(operations.count_in, box))
    found, before, after = snapshot(box), visible(point.before), visible(point.after)
    if status:
        campaign.finding("raw exception", f"{what}: the next run fails: {printed[-300:]}")
    elif not (point.writer.is_whole(visible(found), before, after) and after.items() <= visible(found).items()):
        campaign.finding("wrong answer", f"{what}: the next run gives {differences(found, point.after)}")
    elif left := sorted(found.keys() - visible(found).keys() - point.after.keys()):
        campaign.finding("half output", f"{what}: the next run leaves {', '.join(left)}")


def differences(found: Snapshot, expected: Snapshot) -> str:
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    return f"missing {missing}, more {more}, different {other}"


class Operations:
    """Counts the file operations of a writer in this process, and kills it before number `last` or half done."""

    def __init__(self, last: int, chance: random.Random, writer: Writer):
        self.last, self.fraction, self.writer, self.count = last, chance.random(), writer, 0

    def count_in(self, box: Path, *, told: bool = False) -> None:
        """Runs the writer in `box`, and prints the number of operations if it is to be told."""
        self.box = str(box)
        sys.addaudithook(self._heard)
        os.fsync = self._counted(os.fsync)
        shutil.copyfile = self._counted(shutil.copyfile, self._half_of_copy)
        pathlib.Path.write_bytes = self._counted(pathlib.Path.write_bytes, self._half)
        pathlib.Path.write_text = self._counted(pathlib.Path.write_text, self._half_of_text)
        safetensors.torch.serialize_file = self._counted(safetensors.torch.serialize_file, self._half_of_tensors)
        if not self.writer.exchanges:
            whole_files._exchange = lambda first, second: False
        self.writer.write(box)
        # the last point is after the last operation
        self._step()
        if told:
            print("\n", self.count)

    def _step(self, half: Callable[[], None] | None = None) -> None:
        if self.count == self.last:
            self.last = NEVER
            if half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def _heard(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            is_written = isinstance(path, (str, Path)) and flags & (os.O_WRONLY | os.O_RDWR)
            if not is_written or not str(path).startswith(self.box):
                return
        elif event not in CHANGES:
            return
        self._step()

    def _counted(self, function: Callable, half: Callable | None = None) -> Callable:
        def called(*arguments, **options):
            self._step(half and (lambda: half(*arguments, **options)))
            return function(*arguments, **options)

        return called

    def _half(self, path: str | Path, content: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content[: int(self.fraction * len(content))])

    def _half_of_text(self, path: Path, text: str, **options) -> None:
        self._half(path, text.encode())

    def _half_of_copy(self, source: Path, target: Path) -> None:
        self._half(target, source.read_bytes())

    def _half_of_tensors(self, tensors, path, **options) -> None:
        """safetensors writes to a file of its own and renames it; older versions wrote to the place itself."""
        content = safetensors.torch.serialize(tensors, **options)
        self._half(Path(path).with_name(".tmpABCDEF") if self.fraction < 0.7 else path, content)
