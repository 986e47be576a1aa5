"""Federated rounds in this process: what clients send, what the server makes of it, and what it costs."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from npmerge import merge
from npmerge.aggregate import uniform_soup
from npmerge.evaluate import score
from npmerge.federated import LocalGrid, MergeStrategy, client_app

torch.set_num_threads(1)  # tensors are too small to share out

Batches = list[tuple[Tensor, Tensor]]
State = Mapping[str, Tensor]
MEAN: dict[str, Any] = {
    "aggregate": "mean",
    "align": "identity",
    "many": "all_to_one",
    "correct": None,
}
ALL = {"fraction_evaluate": 0.0}
ONE = {"min_train_nodes": 1, "min_available_nodes": 1, **ALL}


def build(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def images(client: int, count: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(client)
    return [
        (torch.randn(10, 5, generator=generator), torch.randint(3, (10,), generator=generator))
        for _ in range(count)
    ]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def still(_model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


def run(
    strategy: Strategy, app: ClientApp, clients: int = 3, rounds: int = 1
) -> tuple[dict[str, Tensor], LocalGrid]:
    grid = LocalGrid(app, clients)
    result = strategy.start(grid, ArrayRecord(build().state_dict()), num_rounds=rounds)
    return result.arrays.to_torch_state_dict(), grid


def replies(app: ClientApp, clients: int = 3) -> list[Message]:
    """What clients reply in the first round."""
    grid = LocalGrid(app, clients)
    start = ArrayRecord(build().state_dict())
    messages = FedAvg(
        **ONE,
    ).configure_train(1, start, ConfigRecord(), grid)
    return list(grid.send_and_receive(messages))


def model_of(reply: Message) -> nn.Module:
    model = build()
    model.load_state_dict(reply.content["arrays"].to_torch_state_dict())
    return model


def floats(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if value.is_floating_point()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_two_rounds_of_means_are_federated_averaging_by_hand() -> None:
    found, _ = run(
        MergeStrategy(build, **MEAN, **ALL), client_app(build, images, sgd, epochs=2), rounds=2
    )
    server = build().state_dict()
    for _ in range(2):
        states = []
        for client in range(3):
            model = build()
            model.load_state_dict(server)
            optimizer = sgd(model)
            for _ in range(2):
                for inputs, labels in images(client):
                    optimizer.zero_grad()
                    cross_entropy(model(inputs), labels).backward()
                    optimizer.step()
            states.append(model.state_dict())
        server = OrderedDict(
            (name, torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype))
            for name, value in server.items()
        )
    torch.testing.assert_close(found, dict(server))


def test_the_mean_is_that_of_flowers_own_strategy_and_integers_are_kept() -> None:
    app = client_app(build, images, sgd, epochs=1, evaluate_on=images)
    ours, _ = run(MergeStrategy(build, **MEAN), app, rounds=2)
    theirs, _ = run(FedAvg(), app, rounds=2)
    torch.testing.assert_close(floats(ours), {name: theirs[name] for name in floats(ours)})
    assert ours["1.num_batches_tracked"].dtype == torch.int64
    assert theirs["1.num_batches_tracked"].is_floating_point(), (
        "Flower averages counts: this test can fail"
    )


def test_clients_can_be_weighed_by_their_examples_as_flower_weighs_them() -> None:
    app = client_app(build, lambda client: images(client, count=1 + 3 * client), sgd, epochs=1)
    weighed, _ = run(MergeStrategy(build, **MEAN, **ALL, weighted=True), app)
    equal, _ = run(MergeStrategy(build, **MEAN, **ALL), app)
    flower, _ = run(FedAvg(**ALL), app)
    torch.testing.assert_close(floats(weighed), {name: flower[name] for name in floats(weighed)})
    assert not torch.allclose(equal["0.weight"], weighed["0.weight"])


def test_weights_go_with_the_models_whichever_is_the_reference() -> None:
    models, shares = [build(seed) for seed in range(3)], [1.0, 2.0, 5.0]
    mean = uniform_soup(models, weights=shares).state_dict()
    for reference in range(3):
        options = {"weights": shares, "reference": reference}
        found = merge(models, (), **MEAN, many_options=options).model.state_dict()
        torch.testing.assert_close(found["0.weight"], mean["0.weight"])
    soup = MEAN | {"aggregate": "uniform_soup"}
    with pytest.raises(ValueError, match="weights are those of the mean"):
        merge(models, (), **soup, many_options={"weights": shares})
    with pytest.raises(ValueError, match="one finite number for each of the 3 models"):
        merge(models, (), **MEAN, many_options={"weights": [1.0]})


@pytest.mark.parametrize("order", [lambda r: r, reversed], ids=["in order", "reversed"])
def test_one_round_is_the_merge_of_the_clients_models_in_whatever_order_they_come(
    order: Callable[[list[Message]], Iterable[Message]],
) -> None:
    app = client_app(build, images, sgd, epochs=1, start=build)
    came, data = replies(app), images(9)
    options: dict[str, Any] = {
        "align": "permute",
        "aggregate": "np_merge",
        "aggregate_options": {"epochs": 2},
    }
    strategy = MergeStrategy(build, data, **options, seed=5)
    arrays, metrics = strategy.aggregate_train(1, order(came))
    merged = merge([model_of(reply) for reply in came], data, **options, seed=5)
    assert arrays is not None
    assert metrics is not None
    assert same(arrays.to_torch_state_dict(), merged.model.state_dict())
    assert strategy.merged is not None
    assert strategy.merged.history == merged.history
    losses = [reply.content["metrics"]["loss"] for reply in came]
    assert metrics["loss"] == pytest.approx(sum(losses) / 3)


def test_a_method_that_needs_a_base_gets_the_arrays_that_the_round_began_with() -> None:
    app = client_app(build, images, sgd, epochs=1)
    options: dict[str, Any] = {"aggregate": "task_arithmetic", "correct": None}
    found, _ = run(MergeStrategy(build, **options, **ALL), app)
    models = [model_of(reply) for reply in replies(app)]
    assert same(found, merge(models, (), base=build(), **options).model.state_dict())
    assert not same(found, merge(models, (), base=build(1), **options).model.state_dict())


def test_bytes_are_those_of_the_serialised_arrays_and_their_names_in_every_message() -> None:
    app = client_app(build, images, sgd, epochs=1, evaluate_on=images)
    _, grid = run(MergeStrategy(build, **MEAN), app, clients=3, rounds=2)
    model = 0
    for name, value in build().state_dict().items():
        file = io.BytesIO()
        np.save(file, value.numpy())
        model += len(file.getvalue()) + len(name)
    assert grid.bytes_up == 2 * 3 * model
    assert grid.bytes_down == 2 * 3 * model * 2  # to train, and to evaluate


def test_clients_score_the_servers_model_on_images_of_their_own() -> None:
    strategy = MergeStrategy(build, **MEAN)
    app = client_app(build, images, sgd, epochs=1, evaluate_on=lambda client: images(50 + client))
    grid = LocalGrid(app, 3)
    result = strategy.start(grid, ArrayRecord(build().state_dict()), num_rounds=1)
    assert strategy.merged is not None
    scores = [score(strategy.merged.model, images(50 + client)) for client in range(3)]
    found = result.evaluate_metrics_clientapp[1]
    assert found["accuracy"] == pytest.approx(sum(one.top1 for one in scores) / 3)
    assert found["loss"] == pytest.approx(sum(one.loss for one in scores) / 3)


def test_messages_can_be_pushed_and_their_replies_pulled_once() -> None:
    grid = LocalGrid(client_app(build, images, sgd, epochs=1), 2)
    content = RecordDict({"arrays": ArrayRecord(build().state_dict())})
    content["config"] = ConfigRecord({"server-round": 1})
    (message,) = grid.push_messages([grid.create_message(content, "train", 2, "1")])
    (reply,) = grid.pull_messages([message])
    assert (reply.metadata.src_node_id, reply.content["config"]["partition-id"]) == (2, 1)
    assert list(grid.pull_messages([message])) == []


def test_a_client_that_fails_is_left_out_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(client: int) -> Batches:
        if client == 1:
            raise OSError("the disk of client 1 is gone")
        return images(client)

    with caplog.at_level(logging.WARNING, logger="npmerge"):
        found, grid = run(
            MergeStrategy(build, **MEAN, **ALL), client_app(build, broken, sgd, epochs=1)
        )
    whole = replies(client_app(build, images, sgd, epochs=1))
    merged = merge([model_of(whole[0]), model_of(whole[2])], (), **MEAN)
    assert same(found, merged.model.state_dict())
    assert "client 2 failed" in caplog.text
    assert "the disk of client 1 is gone" in caplog.text
    assert grid.bytes_up * 3 == grid.bytes_down * 2


def test_if_all_fail_the_server_keeps_what_it_has() -> None:
    def nobody(_client: int) -> Batches:
        raise OSError("gone")

    strategy = MergeStrategy(build, **MEAN)
    assert strategy.aggregate_train(1, replies(client_app(build, nobody, sgd, epochs=1))) == (
        None,
        None,
    )
    assert strategy.aggregate_train(1, []) == (None, None)
    assert strategy.merged is None


def changed(reply: Message, name: str, value: Tensor) -> Message:
    state = reply.content["arrays"].to_torch_state_dict() | {name: value}
    reply.content["arrays"] = ArrayRecord(OrderedDict(state))
    return reply


def test_values_that_are_not_finite_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    came = replies(client_app(build, images, sgd, epochs=1))
    changed(came[0], "3.bias", torch.tensor([0.0, torch.nan, 0.0]))
    arrays, _ = MergeStrategy(build, **MEAN).aggregate_train(1, came)
    assert arrays is not None
    merged = merge([model_of(reply) for reply in came[1:]], (), **MEAN)
    assert same(arrays.to_torch_state_dict(), merged.model.state_dict())
    assert "node 1: left out, '3.bias'" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "3.bias",
            torch.zeros(4),
            r"node 2: '3.bias' is \(4,\), and in the strategy's model \(3,\)",
        ),
        (
            "4.bias",
            torch.zeros(4),
            r"node 2: '4.bias' is \(4,\), and in the strategy's model missing",
        ),
    ],
)
def test_arrays_of_another_model_are_an_error_of_one_line(
    name: str, value: Tensor, message: str
) -> None:
    came = replies(client_app(build, images, sgd, epochs=1))
    changed(came[1], name, value)
    with pytest.raises(ValueError, match=message) as error:
        MergeStrategy(build, **MEAN).aggregate_train(1, came)
    assert "\n" not in str(error.value)


def test_one_model_is_taken_as_it_is() -> None:
    app = client_app(build, images, sgd, epochs=1)
    strategy = MergeStrategy(build, images(9), align="permute", aggregate="np_merge", **ONE)
    found, _ = run(strategy, app, clients=1)
    assert same(found, model_of(replies(app, 1)[0]).state_dict())
    assert strategy.merged is None


def test_clients_begin_from_the_servers_weights_or_from_their_own() -> None:
    common = replies(client_app(build, images, still, epochs=1))
    own = replies(
        client_app(build, images, still, epochs=1, start=lambda client: build(10 + client))
    )
    for client in range(3):
        assert same(parameters(model_of(common[client])), parameters(build()))
        assert same(parameters(model_of(own[client])), parameters(build(10 + client)))


def test_own_weights_are_those_of_the_first_round_only() -> None:
    app = client_app(build, images, still, epochs=1, start=lambda client: build(10 + client))
    found, _ = run(MergeStrategy(build, **MEAN, **ALL), app, rounds=2)
    again, _ = run(MergeStrategy(build, **MEAN, **ALL), app, rounds=1)
    torch.testing.assert_close(found["0.weight"], again["0.weight"])


def kept(grid: LocalGrid, node: int) -> dict[str, Tensor]:
    return grid.contexts[node].state["own"].to_torch_state_dict()


def test_without_a_pull_clients_train_apart_and_at_one_nothing_is_kept() -> None:
    strategy = MergeStrategy(build, **MEAN, **ALL)
    _, apart = run(strategy, client_app(build, images, sgd, epochs=1, pull=0.0), rounds=3)
    long = replies(client_app(build, images, sgd, epochs=3))
    for node in (1, 2, 3):
        assert same(kept(apart, node), model_of(long[node - 1]).state_dict())
    _, together = run(strategy, client_app(build, images, sgd, epochs=1), rounds=3)
    assert not together.contexts[1].state


def test_a_pull_moves_a_client_from_its_own_model_towards_the_servers() -> None:
    def begins(client: int) -> nn.Module:
        return build(10 + client)

    app = client_app(build, images, still, epochs=1, start=begins, pull=0.25)
    _, grid = run(MergeStrategy(build, **MEAN, **ALL), app, clients=2, rounds=2)
    for client, other in ((0, 1), (1, 0)):
        own, theirs = parameters(begins(client)), parameters(begins(other))
        found = kept(grid, client + 1)
        for name, value in own.items():
            mean = (value + theirs[name]) / 2
            torch.testing.assert_close(found[name], 0.75 * value + 0.25 * mean)


def test_a_share_of_the_weights_is_frozen_for_all_clients_and_drawn_anew_in_each_round() -> None:
    def moved(came: Iterable[Message], start: State) -> list[dict[str, Tensor]]:
        states = [reply.content["arrays"].to_torch_state_dict() for reply in came]
        return [{n: state[n] != start[n] for n in parameters(build())} for state in states]

    app = client_app(build, images, sgd, epochs=1, frozen=0.5)
    grid, server, masks = LocalGrid(app, 2), build().state_dict(), []
    for round_ in (1, 2):
        messages = FedAvg(**ALL).configure_train(round_, ArrayRecord(server), ConfigRecord(), grid)
        one, two = moved(grid.send_and_receive(messages), server)
        masks.append(one["0.weight"])
        assert same(one, two)
    assert 0.2 < masks[0].float().mean() < 0.8
    assert not torch.equal(*masks)


def test_what_clients_learn_depends_on_nothing_but_the_seed() -> None:
    class Drawn:
        """Batches that draw their images from a seed, or else from the global generator."""

        def __init__(self, seed: int) -> None:
            self.seed = seed

        def reseeded(self, seed: int) -> Drawn:
            return Drawn(seed)

        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Any:
            yield from images(self.seed % 2**32, count=1)
            yield torch.randn(10, 5), torch.randint(3, (10,))

    def once(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(np.random.default_rng().integers(2**31))
        app = client_app(build, Drawn, sgd, epochs=2, seed=seed)
        return run(MergeStrategy(build, **MEAN, **ALL), app, rounds=2)[0]

    assert same(once(1), once(1))
    assert not same(once(1), once(2))


def test_a_schedule_goes_on_from_round_to_round() -> None:
    epochs = []

    def schedule(epoch: float) -> float:
        epochs.append(epoch)
        return 1.0

    app = client_app(build, images, sgd, epochs=2, schedule=schedule)
    run(MergeStrategy(build, **MEAN, **ONE), app, clients=1, rounds=2)
    assert epochs == pytest.approx([step / 3 for step in range(1, 13)])


def test_a_client_cannot_change_what_the_others_get() -> None:
    app, seen = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        seen.append(len(arrays))
        arrays.clear()
        message.content["config"]["server-round"] = 7
        content = RecordDict({"arrays": ArrayRecord(build().state_dict())})
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(content, reply_to=message)

    run(MergeStrategy(build, **MEAN, **ALL), app)
    assert seen == [len(build().state_dict())] * 3


def test_a_client_is_run_only_when_its_reply_is_asked_for() -> None:
    trained = []

    def noted(client: int) -> Batches:
        trained.append(client)
        return images(client)

    grid = LocalGrid(client_app(build, noted, sgd, epochs=1), 3)
    start = ArrayRecord(build().state_dict())
    coming = iter(grid.send_and_receive(FedAvg().configure_train(1, start, ConfigRecord(), grid)))
    assert trained == []
    next(coming)
    assert trained == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": "mode"}, "unknown aggregation 'mode'"),
        ({**MEAN, "many": "duel"}, "unknown many 'duel'"),
        ({"aggregate": "np_merge"}, "permute needs data"),
        ({**MEAN, "align": "weight_matching"}, "weight_matching needs data"),
        ({**MEAN, "correct": "reset_batchnorm"}, "reset_batchnorm needs data"),
        ({**MEAN, "aggregate_options": {"beta": 1}}, "mean has no option 'beta'"),
        ({**MEAN, "aggregate": "uniform_soup", "weighted": True}, "clients are weighed in the mean"),
    ],
)  # fmt: skip
def test_what_a_merge_would_raise_is_raised_before_anybody_trains(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MergeStrategy(build, **options)


def test_other_errors_say_what_to_do() -> None:
    with pytest.raises(TypeError, match="fraction"):
        MergeStrategy(build, **MEAN, fraction=1.0)
    with pytest.raises(ValueError, match="clients is 0"):
        LocalGrid(ClientApp(), 0)
    with pytest.raises(ValueError, match="epochs is 0"):
        client_app(build, images, sgd, epochs=0)
    with pytest.raises(ValueError, match=r"pull is 1\.5"):
        client_app(build, images, sgd, epochs=1, pull=1.5)
    app = client_app(build, images, sgd, epochs=1)
    grid = LocalGrid(app, 1)
    grid.contexts[1].node_config = {}
    start = ArrayRecord(build().state_dict())
    (reply,) = grid.send_and_receive(FedAvg(**ONE).configure_train(1, start, ConfigRecord(), grid))
    assert "node 1 has no partition-id" in reply.error.reason


def python(code: str, **environment: str) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_flower_is_an_extra_and_its_telemetry_is_off_unless_it_is_asked_for() -> None:
    advice = """
import os, sys
os.environ.pop("FLWR_TELEMETRY_ENABLED", None)
import npmerge.merging
assert not any(name.partition(".")[0] == "flwr" for name in sys.modules)
sys.modules["flwr"] = None  # as if it were not installed
try:
    import npmerge.federated
except ImportError as error:
    print(error)
del sys.modules["flwr"]
import npmerge.federated
from flwr.supercore.telemetry import FLWR_TELEMETRY_ENABLED
print(FLWR_TELEMETRY_ENABLED)
"""
    said, off = python(advice).splitlines()
    assert said.endswith("pip install npmerge[flower]")
    assert off == "0"
    asked = """
import os, sys
sys.modules["flwr"] = None
try:
    import npmerge.federated
except ImportError:
    print(os.environ["FLWR_TELEMETRY_ENABLED"])
"""
    assert python(asked, FLWR_TELEMETRY_ENABLED="1").strip() == "1"


MEMORY = """
import os, torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from npmerge.federated import LocalGrid, MergeStrategy

torch.set_num_threads(1)
app = ClientApp()

def build():
    return nn.Linear(1000, 1000)

@app.train()
def train(message, context):
    content = RecordDict({"arrays": ArrayRecord(build().state_dict())})
    content["metrics"] = MetricRecord({"num-examples": 1})
    return Message(content, reply_to=message)

def work(strategy, clients):
    strategy.start(LocalGrid(app, clients), ArrayRecord(build().state_dict()), num_rounds=1)

quiet = {"fraction_evaluate": 0.0}
mean = {"aggregate": "mean", "align": "identity", "correct": None, **quiet}
for make in (
    lambda: MergeStrategy(build, **mean, many="tournament"),
    lambda: MergeStrategy(build, **mean, many="all_to_one", weighted=True),
    lambda: FedAvg(**quiet),
):
    for clients in (4, 16):
        child = os.fork()
        if child == 0:
            work(make(), clients)
            os._exit(0)
        _, status, used = os.wait4(child, 0)
        assert status == 0
        print(used.ru_maxrss * 1024)
"""


def test_sixteen_clients_take_the_memory_of_four() -> None:
    model = 4 * 1000 * 1001
    returned_at_once = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # else glibc keeps what is freed
    peaks = [int(line) for line in python(MEMORY, OMP_NUM_THREADS="1", **returned_at_once).split()]
    tournament, all_to_one, flower = (peaks[i + 1] - peaks[i] for i in (0, 2, 4))
    assert tournament < model
    assert all_to_one < model
    assert flower > 8 * model, "FedAvg keeps all replies: this test can fail"
