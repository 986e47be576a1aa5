"""What a profile would cost on so many devices, as tables, and how well that is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from npmerge.experiments import EXPERIMENTS
from npmerge.parameters import PUBLISHED
from npmerge.report.pages import show
from npmerge.report.words import NOTHING, duration, listed, span
from npmerge.run.amounts import KINDS
from npmerge.run.planning import Plan, plan_experiments
from npmerge.run.rates import Rates, Timed, read_timed

TIMES = f"{PUBLISHED}/benchmarks/plan-cpu.csv"
"""The book's times."""
WORKERS = (1, 8, 64)
"""Numbers of devices of the book's table."""
SPEEDS = (50, 100, 200)
"""How many times as fast as the device that was timed a GPU is assumed to be, in that table."""


def plan_table(plans: Mapping[str, Plan]) -> pd.DataFrame:
    """What each experiment would cost.

    Args:
        plans: by the experiments' names.

    Returns:
        A row an experiment, as text: how much is to be done, the time of all of it on one device, one thing after
        another, the time until all is done on so many, and the time that no number goes below.
    """
    return pd.DataFrame.from_dict(
        {
            name: {
                "cells": str(plan.cells),
                "base models": str(plan.base_models),
                "device time": duration(plan.work),
                **{_devices(number): duration(seconds) for number, seconds in plan.wall.items()},
                "any number": duration(plan.least),
            }
            for name, plan in plans.items()
        },
        orient="index",
    ).rename_axis("experiment")


def prediction_table(known: Sequence[Timed], timed: Sequence[Timed] = ()) -> pd.DataFrame:
    """How well times that records hold are predicted, without them: predicted / measured.

    Args:
        known: from records.
        timed: what predicts them; by default each network is predicted by the records of the others.

    Returns:
        A row a network, a column a kind of work, as text: the median over its records, the lowest and the highest, and
        their number.
    """
    rows = {}
    for network in dict.fromkeys(one.network for one in known):
        rates = Rates(timed or [one for one in known if one.network != network])
        row = {}
        for kind in KINDS:
            mine = [one for one in known if (one.network, one.kind) == (network, kind)]
            found = [(rates.seconds(kind, network, one.work), one.seconds) for one in mine]
            ratios = [ours / theirs for ours, theirs in found if ours is not None]
            row[kind] = NOTHING
            if ratios:
                row[kind] = f"{median(ratios):.2f} ({span(ratios, '.2f')}; {len(ratios)})"
        rows[network] = row
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(KINDS)).rename_axis("network")


def rates_sentence(timed: Sequence[Timed], source: str) -> str:
    """Where rates come from, and how much those of a kind differ.

    Args:
        timed: what they are the medians of.
        source: of these, such as a file.
    """
    spread = []
    for kind in KINDS:
        speeds = [one.work / one.seconds / 1e9 for one in timed if one.kind == kind]
        if speeds and kind != "matching":
            spread.append(f"{kind} {span(speeds, '.3g')} ({len(speeds)})")
    where = listed(
        dict.fromkeys(f"{one.device}, threads: {one.threads}, {one.clock} clock" for one in timed)
    )
    return (
        f"Rates from {source}: {len(timed)} times on {where}. "
        f"GFLOP/s of the forward passes, lowest to highest (times): {'; '.join(spread)}."
    )


def speed_sentence(device: str, speed: float) -> str:
    """Says that a device's speed is assumed, where it is.

    Args:
        device: that was timed.
        speed: how many times as fast the planned ones are.
    """
    if speed == 1:
        return f"On devices as fast as {device}:"
    return f"If a device is {speed:g} times as fast as {device} (an assumption, not a measurement):"


def show_plan(
    profile: str = "paper",
    path: str | Path = TIMES,
    *,
    workers: Sequence[int] = WORKERS,
    speeds: Sequence[float] = SPEEDS,
) -> None:
    """Show what the paper's tables and figure would cost at a profile, from times of a file; or that there are none.

    Args:
        profile: name of the parameter set.
        path: from ``npmerge plan --measure``.
        workers: numbers of devices.
        speeds: how many times as fast as the timed one a device is assumed to be.
    """
    if not Path(path).exists():
        show(f"There is no `{Path(path).name}` yet.")
        return
    timed = read_timed(path)
    papers = [name for name, one in EXPERIMENTS.items() if one.table not in ("ours", "cost")]
    plans = {
        speed: plan_experiments(
            papers, profile=profile, workers=workers, rates=Rates(timed), speed=speed
        )
        for speed in (1, *speeds)
    }
    totals = {
        ("as timed" if speed == 1 else f"{speed:g}, assumed"): plan["ALL"]
        for speed, plan in plans.items()
    }
    show(rates_sentence(timed, f"`{Path(path).name}`"))
    if timed[0].device.startswith("CPU"):
        show("No GPU has been timed: its speed, in multiples of this CPU's, is an assumption.")
    show(plan_table(totals).rename_axis("speed"))
    show(speed_sentence(timed[0].device, speeds[0]), plan_table(plans[speeds[0]]))


def _devices(number: int) -> str:
    return f"{number} device{'s' * (number != 1)}"
