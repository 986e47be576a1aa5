"""What alignments that learn share: fixed batches to judge by, the loss that judges, and dropout by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from npmerge.correct.batchnorm import reset_batchnorm
from npmerge.data.streams import Batch, Data, size_of, stream
from npmerge.evaluate.scores import measure, score
from npmerge.training import Loss


def fixed_batches(data: Data, examples: int) -> list[Batch]:
    """The first batches of a pass, on the CPU: the same however often one goes through them.

    Args:
        data: any re-iterable of batches.
        examples: batches are taken until there are so many.

    Raises:
        ValueError: ``examples`` is not positive, or the data is empty or malformed.
    """
    if examples < 1:
        raise ValueError(f"examples is {examples}: it must be at least 1")
    batches: list[Batch] = []
    for batch in stream(data, "cpu"):
        batches.append(batch)
        if sum(map(size_of, batches)) >= examples:
            break
    return batches


def corrected_loss(model: nn.Module, data: Data, loss: Loss | None = None) -> float:
    """The loss of a model whose batch norm is reset on the same data, in evaluation mode.

    Args:
        model: its statistics are changed in place.
        data: any re-iterable of batches.
        loss: of the outputs and the batch; by default the cross-entropy of the labels.
    """
    reset_batchnorm(model, data)
    return score(model, data).loss if loss is None else measure(model, data, loss)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let what PyTorch draws by itself, as for dropout, depend on a seed alone; its generators go on as before.

    Args:
        seed: of the draws.
        device: where they are made, beside the CPU.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
