"""What alpha goes with: rank correlations against cases whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import net

from npmerge.experiments import cells
from npmerge.experiments.coefficients import VARIANTS
from npmerge.run.explaining import explained


def noted(alpha: Any, share: Any) -> dict[str, dict[str, float]]:
    a, b = net(0), net(1)
    named = dict(a.named_parameters())
    theirs = dict(b.named_parameters())
    return explained(
        {name: alpha(p.detach(), theirs[name].detach()) for name, p in named.items()},
        a, b,
        {name: share(p.detach()) for name, p in named.items()},
    )  # fmt: skip


def test_alpha_that_follows_the_fisher_share_has_correlation_one_and_against_it_minus_one() -> None:
    for sign in (1, -1):
        found = noted(lambda own, _, s=sign: torch.sigmoid(s * own), torch.tanh)
        assert all(values["fisher"] == sign for values in found.values() if "fisher" in values)
        assert sum("fisher" in values for values in found.values()) >= 3


def test_alpha_that_moves_where_the_models_differ_and_to_the_larger_one() -> None:
    found = noted(lambda own, other: 0.5 + (own - other).abs() / 10, torch.tanh)
    assert all(v["distance"] == 1 for v in found.values() if "distance" in v)
    found = noted(lambda own, other: own.abs() / (own.abs() + other.abs() + 1e-12), torch.tanh)
    assert all(v["size"] == pytest.approx(1, abs=1e-3) for v in found.values() if "size" in v)


def test_where_nothing_moved_no_correlation_is_claimed() -> None:
    found = noted(lambda own, _: torch.full_like(own, 0.5), torch.tanh)
    for values in found.values():
        assert values["mean"] == 0.5
        assert values["spread"] == 0
        assert not values.keys() & {"fisher", "distance", "size"}


def test_the_variants_differ_from_np_merge_in_what_they_say_and_have_its_steps() -> None:
    todo = cells("coefficients", "digits", [0])
    merged = {cell.name: cell.config for cell in todo}
    given = merged["permute-np_merge"]["aggregate"]["options"]
    for name, variant in VARIANTS.items():
        options = merged[f"{name}-permute-learned_soup"]["aggregate"]["options"]
        assert options.items() >= (given | variant).items()
    assert len({cell.label for cell in todo}) == len(todo)
