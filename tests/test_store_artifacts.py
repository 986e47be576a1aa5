"""Alignments, statistics and corrected models: made once, whoever asks, with the seconds that making them took."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_state, loader, net
from torch import Tensor, nn

from npmerge import align
from npmerge.align import Alignment, Covariances
from npmerge.store.artifacts import Artifacts

A, B = net(0), net(1)
MADE_OF = {"models": ["a", "b"], "images": 24}


def statistics() -> Covariances:
    return align.covariances(A, B, loader())


def alignment() -> Alignment:
    return align.permute(A, B, loader())


def chosen() -> tuple[Alignment, dict[str, Any]]:
    return alignment(), {"ridge": {"chosen": 0.1, "trials": {"0.1": 50.0}}}


def never() -> Any:
    pytest.fail("made again")


def same(x: tuple[Tensor, ...], y: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_an_alignment_is_made_once_with_its_choices_and_its_seconds(tmp_path: Path) -> None:
    def slowly() -> tuple[Alignment, dict[str, Any]]:
        time.sleep(0.2)
        return chosen()

    first, choice, seconds = Artifacts(tmp_path / "x").alignment(MADE_OF, slowly)
    second, same_choice, again = Artifacts(tmp_path / "x").alignment(MADE_OF, never)
    assert seconds == again >= 0.2
    assert choice == same_choice == chosen()[1]
    for found in (first, second):
        assert found.groups == alignment().groups
        assert same(found.maps, alignment().maps)
        assert same(found.inverses, alignment().inverses)
    assert_same_state(second.apply(B).state_dict(), alignment().apply(B).state_dict())


def test_matrices_and_statistics_are_kept_to_the_bit(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    artifacts.statistics(MADE_OF, statistics)
    found, wanted = artifacts.statistics(MADE_OF, never), statistics()
    assert found.groups == wanted.groups
    assert found.counts == wanted.counts
    for name in ("xx", "yy", "xy"):
        assert same(getattr(found, name), getattr(wanted, name))
    matrices, _, _ = artifacts.alignment(
        MADE_OF, lambda: (align.cca(A, B, loader(), statistics=found, ridge=0.1), {})
    )
    assert same(matrices.maps, align.cca(A, B, loader(), statistics=wanted, ridge=0.1).maps)


def test_a_model_is_kept_and_the_one_it_is_like_is_not_changed(tmp_path: Path) -> None:
    artifacts, like = Artifacts(tmp_path), net(5)
    first = artifacts.model(MADE_OF, like, lambda: A)
    second = artifacts.model(MADE_OF, like, never)
    assert first is not second
    assert not any(module.training for module in second.modules())
    assert_same_state(first.state_dict(), A.state_dict())
    assert_same_state(second.state_dict(), A.state_dict())
    assert_same_state(like.state_dict(), net(5).state_dict())


def test_another_configuration_and_another_kind_are_other_files(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path)
    artifacts.model(MADE_OF, A, lambda: A)
    other = artifacts.model(MADE_OF | {"images": 8}, A, lambda: B)
    assert_same_state(other.state_dict(), B.state_dict())
    artifacts.statistics(MADE_OF, statistics)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


KINDS: dict[str, Callable[[Artifacts, Callable[[], Any]], Any]] = {
    "alignment": lambda artifacts, make: artifacts.alignment(MADE_OF, make),
    "statistics": lambda artifacts, make: artifacts.statistics(MADE_OF, make),
    "model": lambda artifacts, make: artifacts.model(MADE_OF, A, make),
}
MAKES: dict[str, Callable[[], Any]] = {
    "alignment": chosen, "statistics": statistics, "model": lambda: A,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_damaged_is_named_and_made_again(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = []

    def make() -> Any:
        made.append(kind)
        return MAKES[kind]()

    KINDS[kind](Artifacts(tmp_path), make)
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    KINDS[kind](Artifacts(tmp_path), make)
    assert made == [kind, kind]
    assert [r.getMessage().split(" (")[0] for r in caplog.records] == [f"{path} is damaged"]


def test_the_seconds_are_the_same_whether_a_part_was_made_or_found(tmp_path: Path) -> None:
    def slow() -> Covariances:
        time.sleep(0.3)
        return statistics()

    def on(artifacts: Artifacts, name: str) -> float:
        def make() -> tuple[Alignment, dict[str, Any]]:
            found = artifacts.statistics(MADE_OF, slow)
            return align.permute(A, B, loader(), statistics=found), {}

        return artifacts.alignment(MADE_OF | {"name": name}, make)[2]

    artifacts = Artifacts(tmp_path)
    making, finding = on(artifacts, "x"), on(artifacts, "y")
    assert making >= 0.3
    assert finding >= 0.3
    started = time.perf_counter()
    assert on(artifacts, "y") == finding
    assert time.perf_counter() - started < 0.3


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    broken: nn.Module = net(0)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ArithmeticError, match=r"model-\w+.safetensors is not written"):
        Artifacts(tmp_path).model(MADE_OF, A, lambda: broken)
