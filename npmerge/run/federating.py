"""What a federated cell is: clients' models merged once, or sent to and fro in rounds, and what each client gets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from npmerge.evaluate import barrier, path
from npmerge.merging import Merger
from npmerge.run.rehearsal import peak_mib
from npmerge.run.work import Bench, Work, base_models, mixed_precision
from npmerge.store.records import Cell, Outcome


def do_federated(cell: Cell, bench: Bench) -> Outcome:
    """Do a cell of the experiment ``federated``.

    Args:
        cell: from it.
        bench: where to do it.

    Returns:
        What any merge gives; and the bytes that are sent up and down, and the accuracy that the mean client and the
        worst one get on images of the classes that they have, in their shares.
    """
    return Clients(cell, bench).outcome()


class Clients(Work):
    """Clients, each with its share of the training images, and a server with some of its own.

    Args:
        cell: of the experiment ``federated``.
        bench: where to do it.
    """

    def __init__(self, cell: Cell, bench: Bench) -> None:
        super().__init__(cell, bench)
        self.rounds: dict[str, Any] | None = cell.config.get("rounds")
        once = {name: value for name, value in cell.config.items() if name != "rounds"}
        self.clients = base_models(replace(cell, config=once))

    def outcome(self) -> Outcome:
        """Merge and score, or score a reference."""
        found = super().outcome()
        values: dict[str, float] = {}
        if self.setting.get("split"):
            accuracy = self.details["classes"]["accuracy"]
            values |= client_accuracy(accuracy, self.seen(self.clients))
            if self.config["align"] is not None:
                values |= self._bytes()
        return replace(found, rows=[*found.rows, *self.rows(values)])

    def merged(self) -> tuple[nn.Module, dict[str, float]]:
        """The server's model in the end, and its barriers to the clients' models."""
        if self.rounds is not None:
            return self._after_rounds(**self.rounds), {}
        model, extra = super().merged()
        if points := self.config["measures"].get("barriers"):
            extra |= self._barriers(model, points)
        if self.config["measures"].get("memory"):
            extra["peak_mib"] = self._memory()
        return model, extra

    def _memory(self) -> float:
        """What a merge with an epoch of learning takes, the models that it loads included, in MiB."""
        options = self.options | {"many": self.config["many"]}
        if "epochs" in options["aggregate_options"]:
            options["aggregate_options"] = options["aggregate_options"] | {"epochs": 1}
        return peak_mib(self.corrected, self.train, options, self.device)

    def _after_rounds(
        self, strategy: str, rounds: int, epochs: int, pull: float = 1.0, frozen: float = 0.0
    ) -> nn.Module:
        """Flower's clients and a server that merges; one client without a share has the server's images."""
        from flwr.app import ArrayRecord, MetricRecord  # an extra: only who needs it has it

        from npmerge.federated import LocalGrid, MergeStrategy, client_app

        logging.getLogger("flwr").setLevel(logging.ERROR)  # it tells of every round
        build, labels, recipe = self.raw[0], self.data.train.labels, self.bases[0].recipe
        shares = [
            self.indices if client.partition == "same" else client.partition.indices(labels)
            for client in self.clients
        ]
        count, curve = len(shares), list[dict[str, float]]()

        def scored(round_: int, arrays: ArrayRecord) -> MetricRecord:
            found = self.scored(_filled(build(), arrays))
            curve.append({"round": round_, "top1": found.top1, "loss": found.loss})
            return MetricRecord({"top1": found.top1})

        app = client_app(
            build,
            lambda number: self.data.train_batches(
                recipe.batch_size, device=self.device, indices=shares[number]
            ),
            recipe.optimizer,
            epochs=epochs, schedule=recipe.rate(), pull=pull, frozen=frozen, seed=self.seed,
            mixed_precision=mixed_precision(self.config, self.device),
        )  # fmt: skip
        options = {name: value for name, value in self.options.items() if name != "base"}
        server = MergeStrategy(
            build, self.train, many=self.config["many"], weighted=strategy == "fedavg",
            fraction_evaluate=0.0, min_train_nodes=count, min_evaluate_nodes=count,
            min_available_nodes=count, **options | {"saved": None},
        )  # fmt: skip
        grid, start = LocalGrid(app, count), ArrayRecord(build().state_dict())
        result = server.start(grid, start, num_rounds=rounds, evaluate_fn=scored)
        if grid.bytes_up != grid.bytes_down:
            raise RuntimeError("the training of a client failed: the log says why")
        if server.merged is not None:
            self._keep(server.merged)
        self.details |= {"curve": curve, "flower_bytes": grid.bytes_up}
        return _filled(build(), result.arrays)

    def _bytes(self) -> dict[str, float]:
        """What all clients send and get, but for the model in the end, after which nothing is learned."""
        tensors = self.raw[0]().state_dict().values()
        model = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        rounds = 1 if self.rounds is None else self.rounds["rounds"]
        sent = float(rounds * len(self.clients) * model)
        return {"bytes_up": sent, "bytes_down": sent if "trunk" in self.setting else 0.0}

    def _barriers(self, server: nn.Module, points: int) -> dict[str, float]:
        """The mean and the highest loss barrier between the server's model and a client's that is aligned to it."""
        merger = Merger(self.train, **self.options | {"saved": None})
        found = []
        for load in self.corrected:
            client = load()
            aligned = merger.align(server, client).apply(client)
            with self._scoring():
                way = path(server, aligned, self.test, points=points, correct=merger.correct)
            found.append(barrier(way))
        self.details["barriers"] = found
        return {"barrier": fmean(found), "worst_barrier": max(found)}


def _filled(model: nn.Module, arrays: Any) -> nn.Module:
    model.load_state_dict(arrays.to_torch_state_dict())
    return model


def client_accuracy(
    accuracy: Sequence[float] | Sequence[Sequence[float]], counts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """What a model is worth to clients: its accuracy on each class, weighed by a client's share of the class.

    Args:
        accuracy: of the model on each class, in percent; or of each client's own model.
        counts: how many training images of each class each client has.

    Returns:
        The mean over the clients, ``"mean_client"``, and the least of them, ``"worst_client"``, in percent.
    """
    of_clients = torch.tensor(counts, dtype=torch.float64)
    shares = of_clients / of_clients.sum(dim=1, keepdim=True)
    each = (shares * torch.tensor(accuracy, dtype=torch.float64)).sum(dim=1)
    return {"mean_client": float(each.mean()), "worst_client": float(each.min())}
