"""Processes that load, store and clear in one folder of prompts and are killed at any moment.

At every moment the files in the folder, hidden ones included, must fit its bound; what is loaded must continue as the
prompt read anew; and after the last one is killed, the folder must hold whole files alone and go on working.
"""

import json
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from deepseek_latent import LatentCache, PromptCache
from tests.cache.prompts import kill_at, last_logits, with_prefix
from tests.support import random_ids, tiny_model

from .campaign import Campaign

PROCESSES = 8
MAX_BYTES = 150_000  # room for four to eight of the prompts
FOREIGN = ["notes.txt", ".hidden", f".{'0' * 64}.v2.safetensors.backup"]


def run(campaign: Campaign) -> None:
    torch.set_num_threads(1)
    model = tiny_model(num_hidden_layers=1, n_routed_experts=None)
    trunks = [random_ids(1, 220, seed) for seed in (1, 2)]
    wanted = [with_prefix(ids, length, seed=length) for ids in trunks for length in (80, 128, 180)]
    wanted += [ids[:, :length] for ids in trunks for length in (70, 150, 220)]
    wanted = [(ids, last_logits(model, ids, LatentCache(model.config))) for ids in wanted]
    for random in campaign.cases():
        with tempfile.TemporaryDirectory() as name:
            for foreign in FOREIGN:
                Path(name, foreign).mkdir()
            one_round(campaign, random, model, wanted, Path(name))


def one_round(campaign: Campaign, random: Random, model, wanted: list[tuple[Tensor, Tensor]], folder: Path) -> None:
    """Runs all processes for a while, replaces those that are killed, and looks at what the last ones leave."""
    told, tell = os.pipe()
    os.set_blocking(told, False)
    workers = [start(model, wanted, folder, random, tell) for _ in range(PROCESSES)]
    seconds, next_kill, largest, text = random.uniform(1, 4), 0.0, 0, b""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        largest = max(largest, bytes_at_once(folder))
        campaign.count("looks at the folder")
        text += read_all(told)
        if time.monotonic() > next_kill:
            next_kill = time.monotonic() + random.uniform(0.01, 0.2)
            os.kill(random.choice(workers), signal.SIGKILL)
        for i, worker in enumerate(workers):
            if os.waitpid(worker, os.WNOHANG)[0]:
                campaign.count("kills")
                workers[i] = start(model, wanted, folder, random, tell)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        campaign.count("kills")
    text += read_all(told)
    for line in text.splitlines():
        said = json.loads(line)
        campaign.counts.update(said["counts"])
        for finding in said["findings"]:
            campaign.finding(finding["kind"], finding["text"])
    os.close(told)
    os.close(tell)
    if not text:
        campaign.finding("hang", f"{PROCESSES} processes did nothing in {seconds:.1f} s")
    if largest > MAX_BYTES:
        campaign.finding("wrong answer", f"the files took {largest:,} bytes, more than max_bytes={MAX_BYTES:,}")
    judge_what_is_left(campaign, model, wanted, folder)


def judge_what_is_left(campaign: Campaign, model, wanted: list[tuple[Tensor, Tensor]], folder: Path) -> None:
    left = bytes_at_once(folder)
    campaign.count("unfinished files left", sum(path.name.endswith(".unfinished") for path in folder.iterdir()))
    turn(campaign, PromptCache(folder, max_bytes=MAX_BYTES), model, *wanted[0])
    names = {path.name for path in folder.iterdir()} - {".lock"}
    if missing := {*FOREIGN} - names:
        campaign.finding("wrong answer", f"the files of others were removed: {missing}")
    if strange := {name for name in names if name[0] == "."} - {*FOREIGN}:
        campaign.finding("half output", f"after the next store there still were {strange}")
    if max(left, bytes_at_once(folder)) > MAX_BYTES:
        campaign.finding("half output", f"what was left took {left:,} bytes, more than max_bytes={MAX_BYTES:,}")


def start(model, wanted: list[tuple[Tensor, Tensor]], folder: Path, random: Random, tell: int) -> int:
    """A process that uses the folder until it is killed: at a random time, in a write, or at a change of a file."""
    seed, change = random.random(), random.choice([None, -1, random.randrange(60), random.randrange(60)])
    if worker := os.fork():
        return worker
    try:
        if change is not None:
            kill_at(change, str(folder))
        work(Random(seed), model, wanted, folder, tell)
    finally:
        os._exit(1)


def work(random: Random, model, wanted: list[tuple[Tensor, Tensor]], folder: Path, tell: int) -> None:
    warnings.simplefilter("error", UserWarning)  # no file may ever look damaged
    prompts = PromptCache(folder, max_bytes=MAX_BYTES)
    while True:
        mine = Campaign(60)
        turn(mine, prompts, model, *random.choice(wanted))
        if random.random() < 0.03:
            with mine.judged("clear", seconds=20):
                prompts.clear()
                mine.count("clears")
        # short enough to be written in one piece, also by several processes
        said = {"counts": mine.counts, "findings": [finding | {"case": None} for finding in mine.findings[:3]]}
        os.write(tell, json.dumps(said).encode() + b"\n")


def turn(campaign: Campaign, prompts: PromptCache, model, ids: Tensor, expected: Tensor) -> None:
    """Loads what is stored of a prompt, computes the rest, and stores all of it."""
    with campaign.judged("load", seconds=20):
        cache = prompts.load(ids, model)
        campaign.count("loads that found something" if cache.get_seq_length() else "loads that found nothing")
        logits = last_logits(model, ids, cache)
        if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
            campaign.finding("wrong answer", f"{cache.get_seq_length()} loaded tokens continue differently")
        prompts.store(cache, ids, model)
        campaign.count("stores")


def bytes_at_once(folder: Path) -> int:
    """The bytes of all files that were there at the same time: those that both of two listings show."""
    first, second = listing(folder), listing(folder)
    return sum(min(size, second[file]) for file, size in first.items() if file in second)


def listing(folder: Path) -> dict[tuple[str, int], int]:
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))
            except FileNotFoundError:
                continue
            files[name, status.st_ino] = status.st_size
    return files


def read_all(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 20)
    except BlockingIOError:
        return b""
