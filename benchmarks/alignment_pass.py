"""The one pass over the data that alignment needs, beside a plain evaluation pass of both models.

``permute`` and ``cca`` are timed in full: finding the symmetry groups, the pass, and the matching or the algebra after
it. The two passes alone have lines of their own.
"""

from __future__ import annotations

from functools import partial

import torch
from _common import interleaved, network, random_batches, read_setting, show, summary, write

import npmerge as npm
from npmerge.align.activations import covariances
from npmerge.data.batches import stream
from npmerge.training import channels_last

BATCHES = 4


def main() -> None:
    setting, file = read_setting(__doc__, batch_size=128, repeats=7)
    a, b = (network(setting, seed).eval() for seed in (0, 1))
    data = random_batches(setting, BATCHES)
    groups = npm.symmetry(a, data[0][0][:1])

    @torch.no_grad()
    def forward() -> None:
        for images, _ in stream(data, setting.device):
            batch = channels_last(images)
            a(batch)
            b(batch)

    rows = summary(
        interleaved(
            {
                "forward pass of both": forward,
                "pass for permute": partial(
                    covariances, a, b, data, groups=groups, variances_only=True
                ),
                "pass for cca": partial(covariances, a, b, data, groups=groups),
                "permute in full": partial(npm.align.permute, a, b, data),
                "cca in full": partial(npm.align.cca, a, b, data),
            },
            setting,
        ),
        "forward pass of both",
        BATCHES * setting.batch_size,
    )
    show(f"Alignment, ResNet20x{setting.width:g}, {BATCHES} batches of {setting.batch_size}", rows)
    write(file, setting, {"pass": rows})


if __name__ == "__main__":
    main()
