"""Batch norm after merging: clear the running statistics and estimate them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from npmerge.data.streams import Data, outputs_of, size_of, stream
from npmerge.device import measuring
from npmerge.methods import method
from npmerge.prepare import checked


@method(
    kind="correct",
    label="Batch norm reset",
    family="correction",
    needs=("data",),
    reference="jordan2023",
    use="After every merge of models with batch norm.",
)
@torch.no_grad()
def reset_batchnorm(model: nn.Module, data: Data) -> nn.Module:
    """Re-estimate the running statistics of every batch norm layer from one pass over ``data``, in place.

    Merged weights produce activations of other scale than either parent's (variance collapse), so the parents'
    statistics do not fit. The statistics are cleared and become the plain average over the batches of the pass. (A
    single image that is left over does not count as a batch: it would weigh as much as one, and may have no variance.)
    Layers other than batch norm stay in evaluation mode; every module's mode is restored. A model without batch norm
    is returned untouched, and the data is not read.

    Args:
        model: the merged model; changed in place.
        data: any re-iterable of batches of training data, augmented like those that the model learned from; the
            labels are not used.

    Returns:
        The same model.

    Raises:
        ValueError: the data is empty; the statistics stay as they were, as after every error.

    Source:
        Jordan et al. 2023 (REPAIR), whose code takes augmented images too; Section IV-A.
    """
    if layers := batchnorms(model):
        re_estimate(model, layers, data)
    return model


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """A model's layers of batch norm that have running statistics.

    Args:
        model: any.
    """
    return [
        m for m in checked(model).modules() if isinstance(m, _BatchNorm) and m.track_running_stats
    ]


def re_estimate(model: nn.Module, layers: Sequence[_BatchNorm], data: Data) -> None:
    """Run a model once over some data, and estimate the statistics of some of its layers again, in place.

    All but these layers are in evaluation mode; every module's mode is restored.

    Args:
        model: the model.
        layers: the layers; there may be none.
        data: any re-iterable of batches.

    Raises:
        ValueError: the data is empty; the statistics stay as they were, as after every error.
    """
    momenta = [layer.momentum for layer in layers]
    before = [(value, value.clone()) for layer in layers for value in layer.buffers(recurse=False)]
    try:
        with measuring(model) as device:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the cumulative average
                layer.train()
            whole = False
            for batch in stream(data, device):
                if whole and size_of(batch) == 1:
                    continue
                outputs_of(model, batch)
                whole = True
    except BaseException:
        for value, old in before:
            value.copy_(old)
        raise
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
