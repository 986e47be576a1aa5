"""Transformers: texts as a data set, heads and the alignments that hold or match them, what is said of records."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from reports import BASE, ENSEMBLE, records
from tiny import loader, net, same_parameters
from torch import Tensor, nn

import npmerge as npm
from npmerge.align import Alignment, permute
from npmerge.align.heads import (
    heads_of,
    permute_by_fixed_head,
    permute_by_head,
    permute_fixed_heads,
)
from npmerge.catalogue import DATASETS
from npmerge.data import Batches, load
from npmerge.data.sets.texts import CATEGORIES, TextBatches, TextSet
from npmerge.experiments import cells
from npmerge.experiments.transformers import HEADS
from npmerge.methods import Combination
from npmerge.models import build
from npmerge.report import transformers
from npmerge.symmetry import Group, SymmetryError
from npmerge.training import fit

TEXTS, SIZE = 200, 32
"""Texts that the alignments are measured on, and dimensions of the small networks."""


@pytest.fixture(scope="module")
def names() -> TextSet:
    data = load("character_names")
    assert isinstance(data, TextSet)
    return data


def encoder(seed: int = 0) -> nn.Module:
    """A text encoder whose layers all matter: nothing is zero or one."""
    model = build("text_encoder", 9, width=0.5, in_channels=39, image_size=32, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def batches(names: TextSet) -> TextBatches:
    return names.first(TEXTS).plain_batches("train", TEXTS)


@pytest.fixture(scope="module")
def groups(batches: TextBatches) -> tuple[Group, ...]:
    return npm.find_symmetry(encoder(), next(iter(batches))[0]).groups


def answers(model: nn.Module, batches: TextBatches) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(next(iter(batches))[0])
    return logits


# --- Texts -----------------------------------------------------------------------------------


def test_texts_are_names_of_their_category_and_none_is_in_both_halves(names: TextSet) -> None:
    seen = []
    for half in (names.train, names.test):
        texts = [half.read(k) for k in range(len(half.labels))]
        found = [unicodedata.ucd_3_2_0.category(unicodedata.lookup(text)) for text in texts]
        assert found == [list(CATEGORIES)[label] for label in half.labels.tolist()]
        seen += texts
    assert len(set(seen)) == len(seen) > 1500


def test_texts_are_what_their_registration_says(names: TextSet) -> None:
    says = DATASETS["character_names"]
    assert (names.name, names.classes) == ("character_names", says.classes)
    assert (names.channels, names.image_size) == (says.channels, says.image_size)
    assert int(names.train.tokens.max()) == names.channels - 1
    each = torch.bincount(names.train.labels)
    assert says.examples_per_class == round(float(each.float().mean()))
    assert len(each) == len(torch.bincount(names.test.labels)) == says.classes
    assert torch.equal(load("character_names").test.tokens, names.test.tokens)  # type: ignore[attr-defined]


def test_texts_are_cut_and_padded_to_the_length_asked_for(names: TextSet) -> None:
    short = load("character_names", image_size=5)
    assert isinstance(short, TextSet)
    assert short.image_size == 5
    assert torch.equal(short.train.tokens, names.train.tokens[:, :5])
    longer = load("character_names", image_size=40)
    assert isinstance(longer, TextSet)
    assert not longer.train.tokens[:, 32:].any()
    with pytest.raises(ValueError, match="image_size is 0: a text needs at least one token"):
        load("character_names", image_size=0)


def test_batches_hold_each_text_once_with_its_label_in_an_order_of_seed_and_epoch(
    names: TextSet,
) -> None:
    labels = {
        tuple(t): int(y)
        for t, y in zip(names.train.tokens.tolist(), names.train.labels, strict=True)
    }

    def one_pass(data: Batches) -> list[tuple[int, ...]]:
        found = []
        for tokens, own in data:
            assert tokens.dtype == own.dtype == torch.int64
            assert [labels[tuple(t)] for t in tokens.tolist()] == own.tolist()
            found += [tuple(t) for t in tokens.tolist()]
        assert len(found) == len(set(found)) == data.images
        return found

    data = names.train_batches(100, seed=3)
    first, second = one_pass(data), one_pass(data)
    assert len(first) == 100 * (len(names.train.labels) // 100)
    assert first != second
    assert one_pass(names.train_batches(100, seed=3)) == first
    assert one_pass(data.reseeded(4)) != first
    data.epoch = 0
    assert one_pass(data) == first
    rows = torch.tensor([5, 2, 9])
    plain = names.plain_batches("train", 2, indices=rows)
    assert torch.equal(torch.cat([tokens for tokens, _ in plain]), names.train.tokens[rows])
    with pytest.raises(ValueError, match="the data is empty"):
        names.plain_batches("test", 2, indices=torch.tensor([], dtype=torch.int64))


def test_a_text_encoder_learns_the_names(names: TextSet) -> None:
    model = build("text_encoder", 9, width=0.5, in_channels=39, image_size=32, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, names.train_batches(50), optimizer, epochs=2)
    top1 = npm.evaluate.accuracy(model.eval(), names.plain_batches("test", 500))[1]
    assert top1 > 35  # one class in nine is 11


# --- Models ----------------------------------------------------------------------------------


def test_transformers_have_the_parameters_counted_by_hand() -> None:
    """At width 1: a block has 4 (64*64 + 64) + (64*256 + 256) + (256*64 + 64) + 2 * 128 = 49,984 parameters."""

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    vit = build("vit", 10, width=1, in_channels=3, image_size=32, seed=0)
    assert count(vit) == (3 * 16 * 64 + 64) + 64 * 64 + 2 * 49_984 + 128 + (64 * 10 + 10)
    text = build("text_encoder", 9, width=1, in_channels=39, image_size=20, seed=0)
    assert count(text) == 39 * 64 + 20 * 64 + 2 * 49_984 + 128 + (64 * 9 + 9)


@pytest.mark.parametrize(("size", "patches"), [(4, 4), (8, 16), (16, 64), (32, 64)])
def test_images_are_cut_into_patches(size: int, patches: int) -> None:
    vit = build("vit", 10, width=0.25, in_channels=1, image_size=size, seed=0)
    assert vit.get_parameter("encoder.positions").shape == (patches, 16)
    assert vit(torch.zeros(2, 1, size, size)).shape == (2, 10)


# --- Heads -----------------------------------------------------------------------------------


def test_each_block_has_heads_with_two_kinds_of_dimensions(groups: tuple[Group, ...]) -> None:
    found = heads_of(groups)
    assert [(one.group.size, [g.size for g in one.inner]) for one in found] == [(4, [8, 8])] * 2
    assert sorted(group.size for group in groups) == [4, 4, 8, 8, 8, 8, 32, 128, 128]
    image = next(iter(loader()))[0]
    assert heads_of(npm.find_symmetry(net(), image)) == []


def test_the_groups_are_symmetries_that_move_nearly_everything(batches: TextBatches) -> None:
    for name, example in (
        ("text_encoder", next(iter(batches))[0]),
        ("vit", torch.randn(2, 1, 8, 8)),
    ):
        channels, size = (39, 32) if name == "text_encoder" else (1, 8)
        model = build(name, 9, width=0.5, in_channels=channels, image_size=size, seed=0)
        found = npm.check_symmetry(model, example)
        assert found.difference < 1e-10
        assert found.moved > 0.99


def turned(model: nn.Module, groups: tuple[Group, ...]) -> nn.Module:
    """The same function with its heads in another order, and each head's dimensions in an order of its own."""
    generator = torch.Generator().manual_seed(1)
    wholes, maps = [], []
    for heads in heads_of(groups):
        order = torch.tensor([2, 0, 3, 1])
        for inner in heads.inner:
            parts = [
                head * inner.size + torch.randperm(inner.size, generator=generator)
                for head in order
            ]
            slots = tuple(replace(slot, repeats=()) for slot in inner.slots)
            wholes.append(Group(inner.name, 4 * inner.size, slots))
            maps.append(torch.cat(parts))
    return Alignment.from_permutations(wholes, maps).apply(model)


def test_only_head_by_head_finds_heads_whose_dimensions_differ(
    batches: TextBatches, groups: tuple[Group, ...]
) -> None:
    a = encoder()
    b = turned(a, groups)
    torch.testing.assert_close(answers(b, batches), answers(a, batches), rtol=1e-3, atol=1e-3)
    assert not same_parameters(a, b)
    assert same_parameters(permute_by_head(a, b, batches, groups=groups).apply(b), a)
    for method in (permute, permute_fixed_heads, permute_by_fixed_head):
        assert not same_parameters(method(a, b, batches, groups=groups).apply(b), a)


@pytest.mark.parametrize("method", [permute_fixed_heads, permute_by_head, permute_by_fixed_head])
def test_alignments_of_heads_keep_the_function_and_can_be_undone(
    method: Callable[..., Alignment], batches: TextBatches, groups: tuple[Group, ...]
) -> None:
    a, b = encoder(0), encoder(1)
    alignment = method(a, b, batches, groups=groups)
    aligned = alignment.apply(b)
    assert not same_parameters(aligned, b)
    torch.testing.assert_close(answers(aligned, batches), answers(b, batches), rtol=1e-3, atol=1e-3)
    assert same_parameters(alignment.inverse().apply(aligned), b)
    found = method(a, b, batches)  # finds the groups itself
    assert all(map(torch.equal, found.maps, alignment.maps))


def test_heads_that_are_held_stay_and_those_that_are_matched_move(
    batches: TextBatches, groups: tuple[Group, ...]
) -> None:
    """A's head computes what B's does at another place: only who matches heads puts it there."""
    a = encoder()
    heads = heads_of(groups)[0].group
    order = torch.tensor([1, 2, 3, 0])
    b = Alignment.from_permutations([heads], [order]).apply(a)
    assert same_parameters(permute(a, b, batches, groups=groups).apply(b), a)
    assert same_parameters(permute_by_head(a, b, batches, groups=groups).apply(b), a)
    held = permute_fixed_heads(a, b, batches, groups=groups)
    assert heads not in held.groups
    value = permute_by_fixed_head(a, b, batches, groups=groups)
    for group, mapping in zip(value.groups, value.maps, strict=True):
        if group.size == SIZE and group.slots[0].name.startswith("encoder.blocks.0.attention"):
            assert torch.equal(mapping // 8, torch.arange(SIZE) // 8)  # each stays in its head


def test_without_heads_they_are_all_permute() -> None:
    data, a, b = loader(), net(0), net(1)
    plain = permute(a, b, data)
    for method in (permute_fixed_heads, permute_by_head, permute_by_fixed_head):
        assert all(map(torch.equal, method(a, b, data).maps, plain.maps))


class Bare(nn.Module):
    """Attention whose projections are parameters of its own, and no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(4, 8)) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, T, 4)`` to ``(N, 2)``."""
        parts = [
            (x @ one).unflatten(-1, (2, 4)).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        ]
        weights = (parts[0] @ parts[1].transpose(2, 3)).softmax(-1)
        logits: Tensor = self.head((weights @ parts[2]).transpose(1, 2).flatten(2).mean(1))
        return logits


def test_dimensions_that_no_layer_puts_out_are_refused_by_name() -> None:
    data = [(torch.randn(8, 5, 4), torch.zeros(8, dtype=torch.int64))]
    with pytest.raises(
        SymmetryError, match=r"no linear layer puts out the dimensions .* take permute"
    ):
        permute_by_head(Bare(), Bare(), data)
    permute_fixed_heads(Bare(), Bare(), data)  # needs no layer


# --- The experiment and its words ------------------------------------------------------------


def test_what_is_learned_is_given_the_same_and_heads_are_treated_in_four_ways() -> None:
    found = {cell.label: cell.config for cell in cells("transformers", "grid", [0])}
    assert {config["setting"]["model"] for config in found.values()} == {"vit", "text_encoder"}
    for label, config in found.items():
        if label.endswith("-finetune"):
            rival = found[label.replace("-finetune", "-np_merge")]
            assert config["aggregate"]["options"] == rival["aggregate"]["options"]
            assert config["aggregate"]["options"]["lr"]["choose"]
    for align in HEADS:
        for aggregate in ("mean", "np_merge"):
            assert sum(label.endswith(f"/{align}-{aggregate}") for label in found) == 2


def made_up(seeds: int, lead: float, heads: float) -> list[npm.store.records.Record]:
    """Averages at 20, fine-tuning at 70, base models at 90; NP Merge and matched heads that much better."""
    spread = [0.1 * seed for seed in range(seeds)]
    values = {BASE: [90.0] * seeds, ENSEMBLE: [91.0] * seeds}
    for align in transformers.ALIGNS:
        values[Combination("mean", align)] = [20.0 + heads * (align == "permute")] * seeds
        values[Combination("finetune", align, tuned=True)] = [70.0] * seeds
        values[Combination("np_merge", align, tuned=True)] = [70.0 + lead + s for s in spread]
    values[Combination("mean", HEADS[0])] = [20.0] * seeds
    where = {"experiment": "transformers", "profile": "grid", "dataset": "digits", "model": "vit"}
    return records(values, split=None, **where)


def test_the_finding_says_who_is_ahead_only_with_three_seeds() -> None:
    text = transformers.findings(made_up(3, 5.0, 2.0))
    assert "two networks reach 20.0 to 22.0 % where each alone has 90.0 %" in text
    assert "ahead beyond the seeds' spread after Permute, Weight Matching or CCA Merge" in text
    assert "change an average by +2.0 points (1 of 1 comparisons beyond the seeds' spread)" in text
    assert "behind beyond" in transformers.findings(made_up(3, -5.0, 2.0))
    few = transformers.findings(made_up(2, 5.0, 2.0))
    assert "2 seeds: not judged" in few
    assert "ahead" not in few


def test_heads_are_compared_where_both_are_there() -> None:
    table = transformers.heads_table(made_up(3, 5.0, 2.0))
    assert len(table) == 1
    assert table.iloc[0].tolist() == ["20.0", "22.0", "+2.0 ± 0.0 (3 seeds)"]


def test_the_verdicts_are_those_of_every_claim_in_each_setting() -> None:
    judged = transformers.transformer_verdicts(made_up(3, 5.0, 2.0))
    assert judged[-1].status == "not run"
    status, _, evidence = transformers.verdict_tables(made_up(3, 5.0, 2.0))
    assert list(status.iloc[:, 0]) == ["reproduced"] * 2 + ["not reproduced"] * 2
    assert "Finetune" in str(evidence.iloc[1, 0])
