"""An NP Merge step beside an Adam fine-tuning step and beside autograd through the re-parametrised weights.

Time: rounds of one call of the library's training loop for each variant, on the same batch; and of ``optimizer.step()``
alone, which a loaded machine disturbs less. Memory: in a process of its own for each variant, the tensors held between
two steps as multiples of the parameters' bytes, the peak in a step as PyTorch counts its allocations, and by how much
the process's resident set grew.

``--model resnet18 --batch-size 64`` is torchvision's ResNet18, whose 11 million parameters make the passes over them
weigh most.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import torch
from _common import (
    Setting,
    begin,
    command_line,
    interleaved,
    network,
    random_batches,
    summary,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from npmerge.aggregate import mean
from npmerge.aggregate.nonuniform import AlphaAdam
from npmerge.memory import allocated
from npmerge.training import Optimizer, fit

LR = 1e-2
MIB = 2**20
Training = tuple[nn.Module, Optimizer]


def np_merge(a: nn.Module, b: nn.Module) -> Training:
    return a, AlphaAdam(a, b, lr=LR)


def fused_adam(a: nn.Module, b: nn.Module) -> Training:
    model = mean(a, b)
    return model, torch.optim.Adam(model.parameters(), lr=LR, fused=True)


def default_adam(a: nn.Module, b: nn.Module) -> Training:
    model = mean(a, b)
    return model, torch.optim.Adam(model.parameters(), lr=LR)


class Mix(nn.Module):
    """The weight as a function of alpha_pre."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, pre: Tensor) -> Tensor:
        alpha = torch.sigmoid(pre)
        return alpha * self.a + (1 - alpha) * self.b


def parametrized(a: nn.Module, b: nn.Module) -> Training:
    """What ``torch.nn.utils.parametrize`` offers for it."""
    modules = dict(b.named_modules())
    for path, module in list(a.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            mix = Mix(parameter.detach().clone(), modules[path].get_parameter(name).detach())
            nn.init.zeros_(parameter)
            parametrize.register_parametrization(module, name, mix)
    return a, torch.optim.Adam(a.parameters(), lr=LR, fused=True)


class Functional(nn.Module):
    """``torch.func.functional_call`` with the mixed weights."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.model = a.requires_grad_(requires_grad=False)
        other = dict(b.named_parameters())
        self.mixes = {n: Mix(p.detach(), other[n].detach()) for n, p in a.named_parameters()}
        self.pre = nn.ParameterList([torch.zeros_like(p) for p in a.parameters()])

    def forward(self, images: Tensor) -> Tensor:
        mixed = zip(self.mixes.items(), self.pre, strict=True)
        return functional_call(self.model, {n: mix(pre) for (n, mix), pre in mixed}, (images,))


def functional(a: nn.Module, b: nn.Module) -> Training:
    model = Functional(a, b)
    return model, torch.optim.Adam(model.pre.parameters(), lr=LR, fused=True)


VARIANTS: dict[str, Callable[[nn.Module, nn.Module], Training]] = {
    "fine-tuning, Adam(fused=True)": fused_adam,
    "fine-tuning, Adam()": default_adam,
    "NP Merge": np_merge,
    "autograd, parametrize": parametrized,
    "autograd, functional_call": functional,
}


def prepare(setting: Setting, variant: str) -> tuple[Callable[[], object], Training]:
    """A function that takes training steps, and what it trains; nothing but what they need is kept."""
    model, optimizer = VARIANTS[variant](network(setting, 0), network(setting, 1))
    batches = random_batches(setting, 1) * _steps(setting)
    return lambda: fit(model, batches, optimizer, epochs=1), (model, optimizer)


def alone(model: nn.Module, optimizer: Optimizer) -> Callable[[], object]:
    """``optimizer.step`` on a gradient of zero: NP Merge's turns it in place, and any other would become subnormal."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    return optimizer.step


def memory(setting: Setting, variant: str) -> dict[str, float]:
    """Memory of a variant; to be called in a fresh process."""
    torch.set_num_threads(setting.threads)
    parameters = sum(p.nbytes for p in network(setting, 0).parameters())
    batch = sum(t.nbytes for t in random_batches(setting, 1)[0])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def two_steps() -> object:
        kept = prepare(setting, variant)
        for _ in range(2):
            kept[0]()
        return kept

    found = allocated(two_steps, torch.device(setting.device))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    return {
        "held / parameters": (found.held - batch) / parameters,
        "peak MiB": found.peak / MIB,
        "RSS growth MiB": grown / 1024,
    }


def _steps(setting: Setting) -> int:
    """Steps a round: a GPU works behind the program, so the wait at a round's end must not count there."""
    return 1 if setting.device == "cpu" else 20


def main() -> None:
    setting, report = begin(command_line(__doc__, batch_size=128, repeats=15), Setting)
    measured = {}
    for variant in VARIANTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured[variant] = pool.submit(memory, setting, variant).result()

    prepared = {variant: prepare(setting, variant) for variant in VARIANTS}
    seconds = interleaved({v: step for v, (step, _) in prepared.items()}, setting)
    baseline = next(iter(VARIANTS))
    rows = summary(seconds, baseline, _steps(setting) * setting.batch_size)
    for variant, row in rows.items():
        row["extra"] = measured[variant]
    report.table(f"Training step, {setting.network}, batch {setting.batch_size}", rows)

    steppers = {v: alone(*prepared[v][1]) for v in VARIANTS if not v.startswith("autograd")}
    many = replace(setting, repeats=20 * setting.repeats)
    optimizing = summary(interleaved(steppers, many), baseline, setting.batch_size)
    report.table("Of it, optimizer.step() alone", optimizing)
    extra = optimizing["NP Merge"]["ms"] - optimizing[baseline]["ms"]
    share = extra / (rows[baseline]["ms"] / _steps(setting))
    report.note(f"NP Merge's own arithmetic: {extra:.2f} ms, {share:.1%} of a fine-tuning step.")
    report.write()


if __name__ == "__main__":
    main()
