"""A grid of Flower clients that are run in this process, one after another."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict, UserConfigValue
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

log = logging.getLogger(__name__)

SERVER = 0
"""The server's node; those of the clients are counted from 1."""
RUN = 1


class LocalGrid(Grid):
    """Runs a ``ClientApp`` for some nodes without a network, a server process or Ray.

    A client is run when its reply is asked for, and the next one not before: however many there are, the records of one
    are in memory, beside what the clients keep in their contexts. They take turns in the order of their numbers, so
    that replies come in the same order in every run. An exception in a client becomes a reply with an error, as in
    Flower's own runtime.

    Two things are Flower's: where a strategy wants more nodes than there are, it waits forever, so that one client
    needs ``min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1``; and where not all nodes take part it draws
    them by Python's ``random``, which is the caller's to seed.

    Args:
        app: what the clients do; each finds its number, from 0, as ``context.node_config["partition-id"]``.
        clients: how many there are.
        run_config: what all find as ``context.run_config``.

    Attributes:
        contexts: of the clients, by node; they last from round to round.
        bytes_down: of the arrays that were sent to clients so far, as Flower serialises them, and their names.
        bytes_up: of those that clients sent back.

    Raises:
        ValueError: there is no client.
    """

    def __init__(
        self,
        app: ClientApp,
        clients: int,
        *,
        run_config: Mapping[str, UserConfigValue] | None = None,
    ) -> None:
        if clients < 1:
            raise ValueError(f"clients is {clients}: give at least 1")
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, RUN, SERVER
        self._app, self._run = app, Run.create_empty(RUN)
        self._numbers, self._pushed = itertools.count(), dict[str, Message]()
        self.contexts = {
            number + 1: Context(
                run_id=RUN, node_id=number + 1, state=RecordDict(),
                node_config={"partition-id": number, "num-partitions": clients},
                run_config=dict(run_config or {}),
            )
            for number in range(clients)
        }  # fmt: skip
        self.bytes_down = self.bytes_up = 0

    @property
    def run(self) -> Run:
        """A description of the run, empty if it was not set."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set what :attr:`run` is."""
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """A message from the server, as Flower's ``Message`` has it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The clients' nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are pulled, by what is returned, in the order of the clients."""
        ordered = sorted(messages, key=lambda message: message.metadata.dst_node_id)
        pushed = {f"message-{next(self._numbers)}": message for message in ordered}
        self._pushed |= pushed
        return list(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run one client after another, and give its reply, once for each message."""
        for message_id in message_ids:
            if message_id in self._pushed:
                yield self._reply(self._pushed.pop(message_id))

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,  # noqa: ARG002 - clients are waited for
    ) -> Iterator[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _reply(self, message: Message) -> Message:
        received = copy.copy(message)
        received.content = _copied(message.content)  # one client's changes are not another's
        self.bytes_down += _bytes(received)
        try:
            reply = self._app(received, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # whatever a client's code raises
            log.warning("client %d failed", message.metadata.dst_node_id, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=received)
        self.bytes_up += _bytes(reply)
        return reply


def _copied(content: RecordDict) -> RecordDict:
    return RecordDict({name: record.copy() for name, record in content.items()})


def _bytes(message: Message) -> int:
    records = message.content.values() if message.has_content() else ()
    return sum(record.count_bytes() for record in records if isinstance(record, ArrayRecord))
