"""Federated learning on Flower: a strategy that merges, clients that train, and a grid that runs them right here."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it when it is imported
try:
    import flwr  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "federated learning runs on Flower, which is not here: pip install npmerge[flower]"
    ) from error

from npmerge.federated.clients import client_app
from npmerge.federated.in_process import LocalGrid
from npmerge.federated.server import MergeStrategy

__all__ = ["LocalGrid", "MergeStrategy", "client_app"]
