"""A Flower strategy that merges what clients have trained, by any method of the registry."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import nn

from npmerge.aggregate.summing import emptied, with_tensors
from npmerge.align import Alignment
from npmerge.data.streams import Data
from npmerge.federated.clients import NUMBER
from npmerge.many import Load
from npmerge.merging import Merged, Merger, merge
from npmerge.methods import Kind, find
from npmerge.store.checkpoints import State, load_state, not_finite, save_state

log = logging.getLogger(__name__)

OF_MERGE, OF_MERGER = (
    signature(one).parameters.keys() - {"models", "data", "base"} for one in (merge, Merger)
)
"""Arguments that a strategy passes on; the others are its own to give."""


class MergeStrategy(FedAvg):
    """Takes the place of Flower's ``FedAvg``: clients' models become one by :func:`npmerge.merging.merge`.

    A reply is written to a temporary file as soon as it arrives, so that a server whose grid hands out one reply after
    another (:class:`~npmerge.federated.in_process.LocalGrid`) holds no more models than the merge: two, in a
    tournament or where all are aligned to one for their mean. Models are in the order of their clients'
    ``"partition-id"`` where replies bring it in a ``ConfigRecord``, else of their nodes: the result does not depend on
    who is first. Replies with an error, or with values that are not finite, are left out, and the log says so. One
    model is taken as it is; of none, the server keeps what it has. Integers, such as the count of batch norm's batches,
    are the first client's, not a mean.

    Args:
        build: makes a model of the clients' architecture.
        data: the server's, a re-iterable of batches, for methods that need some.
        align, aggregate, correct, many: as :func:`npmerge.merging.merge` has them. The mean of any number of models is
            ``aggregate="mean", many="all_to_one"``: in a tournament, a model with a bye has more weight. A method that
            needs a base gets the model that the round began with.
        weighted: weigh clients by their numbers of examples (``weighted_by_key``), of the mean and all to one.
        seed: of the first round; each further one counts on.
        options: further arguments of :func:`npmerge.merging.merge` (``align_options``, ``aggregate_options``,
            ``learn_on``, ``device``, ...) and of ``FedAvg`` (``min_train_nodes``, ``fraction_evaluate``, ...).

    Attributes:
        merged: how the last round's model was made; ``None`` if there was nothing to merge.

    Raises:
        ValueError: an unknown method or option, or a method without the data that it needs.
        TypeError: an option that neither has.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Data | None = None,
        *,
        align: str | Alignment | None = None,
        aggregate: str = "np_merge",
        correct: str | None = "reset_batchnorm",
        many: str | None = None,
        weighted: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        given = {name: options.pop(name) for name in OF_MERGE & options.keys()}
        super().__init__(**options)
        given |= {"align": align, "aggregate": aggregate, "correct": correct}
        self._options, self._many = given, dict(given.pop("many_options", {}))
        self._data: Data = () if data is None else data
        self._way, self._weighted, self._seed = many, weighted, seed
        self._like, self._sent = emptied(build()), ArrayRecord()
        self.merged: Merged | None = None
        # What a merge would raise is raised now, and not after a round of training.
        Merger(self._data, base=self._like, **{n: v for n, v in given.items() if n in OF_MERGER})
        method = find(aggregate, "aggregate")
        self._needs_base = "base" in method.needs
        names: dict[Kind, Any] = {
            "align": align or method.default_alignment, "aggregate": aggregate,
            "correct": correct, "many": many,
        }  # fmt: skip
        for kind, name in names.items():
            needs = find(name, kind).parameters if isinstance(name, str) else ()
            if data is None and {"data", "groups", "example"} & set(needs):
                raise ValueError(f"{name} needs data: give the server some, or another method")
        if weighted and (aggregate, many) != ("mean", "all_to_one"):
            raise ValueError(
                f"clients are weighed in the mean of all, and not by {aggregate!r} in {many or 'pairs'!r}: "
                "give aggregate='mean', many='all_to_one'"
            )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As ``FedAvg``; the arrays that are sent are the round's base."""
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the models of the replies.

        Args:
            server_round: counted from 1.
            replies: of clients; each holds a record of arrays, and one of metrics with its number of examples.

        Returns:
            The merged model's arrays, and the metrics as ``FedAvg`` aggregates them; ``None`` if no reply is valid.

        Raises:
            ValueError: arrays do not fit the model, or as :func:`npmerge.merging.merge`.
            SymmetryError, TrainingError: as :func:`npmerge.merging.merge`.
        """
        self.merged = None
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            light = [one for reply in replies if (one := self._put_away(reply, folder))]
            valid, _ = self._check_and_log_replies(light, is_train=True)
            if not valid:
                return None, None
            valid.sort(key=self._place)
            contents = [reply.content for reply in valid]
            if self._weighted:
                metrics = [next(iter(one.metric_records.values())) for one in contents]
                self._many["weights"] = [one[self.weighted_by_key] for one in metrics]
            loads = [partial(self._load, _file(folder, reply)) for reply in valid]
            model = self._merge(loads, server_round) if len(loads) > 1 else loads[0]()
        arrays = ArrayRecord(model.state_dict())
        return arrays, self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    def _merge(self, loads: Sequence[Load], server_round: int) -> nn.Module:
        base = self._model(self._sent.to_torch_state_dict()) if self._needs_base else None
        self.merged = merge(
            loads, self._data, many=self._way, many_options=self._many, base=base,
            seed=self._seed + server_round - 1, **self._options,
        )  # fmt: skip
        return self.merged.model

    def _put_away(self, reply: Message, folder: Path) -> Message | None:
        """A reply without its arrays, which are written to a file; ``None`` if they are not finite."""
        if reply.has_error():
            return reply
        light, node = copy.copy(reply), reply.metadata.src_node_id
        light.content = reply.content.copy()
        for key, arrays in reply.content.items():  # array_records would be a cycle that holds them
            if not isinstance(arrays, ArrayRecord):
                continue
            state = self._model(arrays.to_torch_state_dict(), f"node {node}: ").state_dict()
            if broken := not_finite(state):
                log.warning("node %d: left out, %r has values that are not finite", node, broken)
                return None
            save_state(_file(folder, reply), state, {})
            light.content[key] = ArrayRecord()
        return light

    def _load(self, path: Path) -> nn.Module:
        return self._model(load_state(path))

    def _model(self, state: State, whose: str = "") -> nn.Module:
        wanted = {name: tuple(value.shape) for name, value in self._like.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        for name in wanted | given:
            if wanted.get(name) != given.get(name):
                raise ValueError(
                    f"{whose}{name!r} is {given.get(name, 'missing')}, and in the strategy's model "
                    f"{wanted.get(name, 'missing')}: build the same model in both"
                )
        return with_tensors(self._like, state)

    def _place(self, reply: Message) -> tuple[bool, int]:
        """By the clients' numbers, as far as they come with one, and then by nodes."""
        for config in reply.content.config_records.values():
            if NUMBER in config:
                return False, cast("int", config[NUMBER])
        return True, reply.metadata.src_node_id


def _file(folder: Path, reply: Message) -> Path:
    return folder / f"{reply.metadata.src_node_id}.safetensors"
