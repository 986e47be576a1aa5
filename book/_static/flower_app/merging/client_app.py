"""A client, in plain Flower and PyTorch: it trains the server's model on images of its own."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

HELD_BY_SERVER = 200


def build() -> nn.Module:
    """The model of clients and server."""
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def images(rows: slice) -> TensorDataset:
    """Some of the digits."""
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
    return TensorDataset(inputs[rows], torch.tensor(digits.target)[rows])


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: five epochs on every n-th image."""
    number, clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    torch.manual_seed(number)
    model = build()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    own = images(slice(HELD_BY_SERVER + number, None, clients))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(5):
        for inputs, labels in DataLoader(own, batch_size=32, shuffle=True, drop_last=True):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    content = {
        "arrays": ArrayRecord(model.state_dict()),
        "metrics": MetricRecord({"num-examples": len(own), "loss": loss.item()}),
        "config": ConfigRecord({"partition-id": number}),  # the server's order of the models
    }
    return Message(RecordDict(content), reply_to=message)
