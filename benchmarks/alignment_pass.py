"""The one pass over the data that alignment needs, beside a plain evaluation pass of both models.

``permute`` and ``cca`` are timed in full: finding the symmetry groups, the pass, and the matching or the algebra after
it. The two passes alone have lines of their own.
"""

from __future__ import annotations

from functools import partial

import torch
from _common import Setting, begin, command_line, interleaved, network, random_batches, summary

from npmerge.align import cca, covariances, permute
from npmerge.data.streams import stream
from npmerge.symmetry import find_symmetry

BATCHES = 4


def main() -> None:
    setting, report = begin(command_line(__doc__, batch_size=128, repeats=7), Setting)
    a, b = (network(setting, seed).eval() for seed in (0, 1))
    data = random_batches(setting, BATCHES)
    groups = find_symmetry(a, data[0][0][:1])

    @torch.no_grad()
    def forward() -> None:
        for images, _ in stream(data, setting.device):
            a(images)
            b(images)

    rows = summary(
        interleaved(
            {
                "forward pass of both": forward,
                "pass for permute": partial(
                    covariances, a, b, data, groups=groups, variances_only=True
                ),
                "pass for cca": partial(covariances, a, b, data, groups=groups),
                "permute in full": partial(permute, a, b, data),
                "cca in full": partial(cca, a, b, data),
            },
            setting,
        ),
        "forward pass of both",
        BATCHES * setting.batch_size,
    )
    report.table(f"Alignment, {setting.network}, {BATCHES} batches of {setting.batch_size}", rows)
    report.write()


if __name__ == "__main__":
    main()
