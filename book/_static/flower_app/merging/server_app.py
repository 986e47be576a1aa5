"""The server: FedAvg's place is taken by a strategy that aligns the models and learns how to weigh them."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from merging.client_app import HELD_BY_SERVER, build, images
from npmerge.federated import MergeStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    torch.manual_seed(0)
    data = DataLoader(images(slice(HELD_BY_SERVER)), batch_size=50)
    strategy = MergeStrategy(
        build, data, align="permute", aggregate="np_merge", aggregate_options={"epochs": 5},
        fraction_evaluate=0.0,
    )  # fmt: skip
    start = ArrayRecord(build().state_dict())
    result = strategy.start(grid, start, num_rounds=context.run_config["rounds"])
    save_file(result.arrays.to_torch_state_dict(), context.run_config["output"])
