"""Merging 2 to 16 models that are loaded when they are needed, beside models that are all held in memory.

A tournament of pairs, and all to one; both align by permute and take the mean, so that what is counted is what comes
with the number of models. Time: a merge's share of the whole, loading, writing and reading included; images are those
that the alignments see. Memory: in a process of its own for each variant, the peak as PyTorch counts its allocations,
also as a multiple of one model's bytes.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from _common import Setting, begin, command_line, interleaved, network, random_batches, summary
from torch import nn

from npmerge.aggregate import mean
from npmerge.align import permute
from npmerge.data.streams import Data
from npmerge.many import Models, Pairing, all_to_one, tournament
from npmerge.memory import allocated
from npmerge.store.checkpoints import load_into, save_state

COUNTS = (2, 4, 8, 16)
BATCHES = 2


def by_tournament(models: Models, data: Data) -> nn.Module:
    def merge(a: nn.Module, b: nn.Module, pairing: Pairing) -> nn.Module:
        share = len(pairing.a) / len(pairing.a + pairing.b)
        return mean(a, permute(a, b, data).apply(b), alpha=share)

    return tournament(models, merge, seed=0)


def by_all_to_one(models: Models, data: Data) -> nn.Module:
    return all_to_one(models, lambda a, b: permute(a, b, data))


METHODS: dict[str, Callable[[Models, Data], nn.Module]] = {
    "Tournament": by_tournament,
    "All to one": by_all_to_one,
}
VARIANTS = {
    **{f"{count} models": (count, False) for count in COUNTS},
    f"{COUNTS[-1]} models, all held": (COUNTS[-1], True),
}
"""How many models, and whether all of them are in memory from the start."""


def prepare(setting: Setting, method: str, variant: str, folder: Path) -> Callable[[], object]:
    """A function that merges models from files."""
    count, held = VARIANTS[variant]
    models = [partial(load, setting, folder / f"{seed}.safetensors") for seed in range(count)]
    if held:
        models = [partial(_itself, model()) for model in models]
    return partial(METHODS[method], models, random_batches(setting, BATCHES))


def load(setting: Setting, path: Path) -> nn.Module:
    return load_into(network(setting, 0), path)


def _itself(model: nn.Module) -> nn.Module:
    return model


def memory(setting: Setting, method: str, variant: str, folder: Path) -> dict[str, float]:
    """Memory of a variant; to be called in a fresh process."""
    torch.set_num_threads(setting.threads)
    size = sum(v.nbytes for v in load(setting, folder / "0.safetensors").state_dict().values())
    device = torch.device(setting.device)
    peak = allocated(lambda: prepare(setting, method, variant, folder)(), device).peak
    return {"peak / model": peak / size, "peak MiB": peak / 2**20}


def main() -> None:
    parser = command_line(__doc__, batch_size=8, repeats=3)
    parser.set_defaults(width=4)  # models that can be told from what alignment itself needs
    setting, report = begin(parser, Setting)
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's own messages
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(max(COUNTS)):
            save_state(folder / f"{seed}.safetensors", network(setting, seed).state_dict(), {})
        for method in METHODS:
            measured = {}
            for variant in VARIANTS:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    job = pool.submit(memory, setting, method, variant, folder)
                    measured[variant] = job.result()
            prepared = {v: prepare(setting, method, v, folder) for v in VARIANTS}
            seen = {
                variant: (count - 1) * BATCHES * setting.batch_size
                for variant, (count, _) in VARIANTS.items()
            }
            rows = summary(interleaved(prepared, setting), next(iter(VARIANTS)), seen)
            for variant, row in rows.items():
                row["extra"] = measured[variant]
            merges = f"{BATCHES} batches of {setting.batch_size} an alignment"
            report.table(f"{method}, {setting.network}, {merges}", rows)
            few, many = (measured[f"{count} models"]["peak MiB"] for count in (2, COUNTS[-1]))
            report.note(f"{COUNTS[-1]} models need {many / few:.2f} times the memory of 2.")
    report.write()


if __name__ == "__main__":
    main()
