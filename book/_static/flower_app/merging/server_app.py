"""The server aligns the clients' models and learns how to weigh them."""

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
        build,
        data,
        align="permute",
        aggregate="np_merge",
        aggregate_options={"epochs": 5},
        fraction_evaluate=0.0,
    )
    start = ArrayRecord(build().state_dict())
    rounds, output = (context.run_config[name] for name in ("rounds", "output"))
    result = strategy.start(grid, start, num_rounds=rounds)
    save_file(result.arrays.to_torch_state_dict(), output)
