"""The tables and figures of the chapter on federated learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npmerge.experiments.federated import AT_ONCE, COMMON, IN_PAIRS, OWN
from npmerge.methods import FAMILIES, METHODS, Combination
from npmerge.report.captions import captioned, whose
from npmerge.report.numbers import in_order, is_merged, method_of
from npmerge.report.plots import describe, label_ends, panels
from npmerge.report.words import NOTHING, listed, plus_minus
from npmerge.store.records import Record

BASE, ENSEMBLE = Combination("base_models", correct=None), Combination("ensemble")
STARTS = {False: "own initial weights", True: "common initial weights"}
"""What clients begin from, by whether it is the same for all."""
EVERYTHING, SERVER = "all images at one place", "the server's images only"
"""Models without a federation."""
STRATEGIES = {
    "fedavg": ("FedAvg", "averaging", "-"),
    "fedavg_uniform": ("Unweighed FedAvg", "averaging", ":"),
    "np_merge": ("NP Merge at the server", "np", "-"),
    "finetune": ("Fine-tuning at the server", "finetune", "-"),
    "papa": ("PAPA", "training", "-"),
    "frozen": ("FedAvg, some weights frozen", "training", ":"),
}
"""Names of what rounds are made of, with the family whose colour each has, and a line."""
METRICS = ("top1", "mean_client", "worst_client", "barrier", "bytes_up", "bytes_down", "peak_mib")
MIB = 2**20

Rows = Any
"""Of :func:`measured`: more is known of their columns than pandas tells."""


def measured(records: Sequence[Record]) -> Rows:
    """What was measured, a row a record.

    Args:
        records: of ``federated`` at one profile.

    Returns:
        The ``seed``; the ``concentration`` of the clients' classes, NaN without clients; whether they had ``common``
        initial weights, and how many ``clients`` there are; the ``method``, a combination or, of more than one round
        and without clients, a name; the number of ``rounds``; and a column a metric.
    """
    return pd.DataFrame([dict.fromkeys(METRICS) | _row(record) for record in records]).astype(
        dict.fromkeys(METRICS, float)
    )


def _row(record: Record) -> dict[str, Any]:
    setting, rounds = record.config["setting"], record.config.get("rounds")
    method: Any = method_of(record)
    if not setting.get("split"):
        method = EVERYTHING if rounds is None else SERVER
    elif rounds is not None:
        method = rounds["strategy"]
    return {
        "seed": record.cell.seed,
        "concentration": setting.get("concentration") if setting.get("split") else None,
        "common": "trunk" in setting,
        "clients": record.rows[0].models,
        "method": method,
        "rounds": 1 if rounds is None else rounds["rounds"],
        "federated": isinstance(method, Combination),
        **{row.metric: row.value for row in record.rows},
    }


def _once(rows: Rows) -> Rows:
    """One round, with the number of clients that most methods were run with."""
    once = rows[rows["federated"]]
    return once[once["clients"] == once["clients"].mode().min()]


def _merged_once(rows: Rows) -> Rows:
    """Those of :func:`_once` whose start has something merged at its place."""
    once = _once(rows)
    return once.groupby(["concentration", "common"]).filter(
        lambda here: any(map(is_merged, here["method"]))
    )


def _usual(rows: Rows) -> float:
    """The concentration at which most methods were run."""
    return float(_merged_once(rows)["concentration"].mode().min())


def _alone(rows: Rows) -> dict[str, float]:
    """The mean accuracy without a federation."""
    return {
        str(name): float(here["top1"].mean())
        for name, here in rows[rows["method"].isin([EVERYTHING, SERVER])].groupby(
            "method", sort=False
        )
    }


def findings(records: Sequence[Record]) -> str:
    """What was found, as Markdown.

    Args:
        records: of ``federated`` at one profile.
    """
    rows = measured(records)
    return "\n".join(f"- {sentence}" for sentence in _sentences(rows))


def _sentences(rows: Rows) -> Iterator[str]:
    told = [f"{name} {value:.1f} %" for name, value in _alone(rows).items()]
    if told:
        yield f"Without a federation: {listed(told)}."
    for common, started in _once(rows).groupby("common"):
        if sentence := _best(started, _alone(rows).get(SERVER)):
            yield f"One round, {STARTS[common]}: {sentence}"
    told = []
    for count, here in _rounds(rows).groupby("rounds"):
        means = here.groupby("method", sort=False)["top1"].mean()
        best, usual = means.idxmax(), means.get("fedavg")
        other = "" if best == "fedavg" or usual is None else f" (FedAvg {usual:.1f} %)"
        told.append(f"in {_counted(count)} {STRATEGIES[best][0]} {means[best]:.1f} %{other}")
    if told:
        yield f"At the same epochs in all, the best is {listed(told)}."


def _best(started: Rows, server: float | None) -> str:
    """The best merge at each concentration, the ensemble there, and how many are worth what was sent."""
    best, ensemble, above = [], [], []
    for concentration, here in started.groupby("concentration"):
        means = _means(here)["top1"]
        merged = means[list(map(is_merged, means.index))]
        if merged.empty:
            continue
        best.append(
            f"{_name(merged.idxmax())} {merged.max():.1f} % at concentration {concentration:g}"
        )
        if ENSEMBLE in means:
            ensemble.append(f"{means[ENSEMBLE]:.1f} %")
        if server is not None and (count := int((merged > server).sum())):
            above.append(f"{count} of {len(merged)} at concentration {concentration:g}")
    if not best:
        return ""
    told = f"the best merge is {listed(best)}"
    if ensemble:
        told += f"; the ensemble has {listed(ensemble)}"
    if server is not None:
        told += f". Better than {SERVER}: {listed(above) if above else 'none'}"
    return f"{told}."


def _means(rows: Rows) -> Rows:
    """Means over the seeds, a row a method in the registry's order."""
    methods = in_order(rows["method"])
    return rows.groupby("method", sort=False)[list(METRICS)].mean().reindex(methods)


def _name(method: Combination) -> str:
    """Without the way to make one of many, where it is the usual one."""
    many = None if method.many in (AT_ONCE, IN_PAIRS) else method.many
    return replace(method, many=many).label.removesuffix(" (ours)").removesuffix(", tuned")


def _row_name(method: Combination, common: bool) -> str:
    """The same for both starts, after the alignment that is usual for each."""
    usual = method.align == (COMMON if common else OWN) or METHODS[method.aggregate].aligns
    one = METHODS[method.aggregate]
    return one.label if usual and method.aggregate != "mean" else _name(method)


def _counted(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds} rounds"


def _rounds(rows: Rows) -> Rows:
    return rows[rows["method"].isin(list(STRATEGIES))]


def methods_table(records: Sequence[Record]) -> pd.DataFrame:
    """Every method in one round, clients with their own initial weights beside common ones.

    Args:
        records: of ``federated`` at one profile.

    Returns:
        A row a method, at the concentration at which most were run.
    """
    rows = measured(records)
    usual = _usual(rows)
    once = _once(rows)
    here = once[once["concentration"] == usual]
    if here.empty:
        return captioned(pd.DataFrame(), f"Nothing was merged yet ({whose(records)}).")
    found: dict[str, dict[tuple[str, str], str]] = {}
    for (common, method), some in here.groupby(["common", "method"], sort=False):
        row = found.setdefault(_row_name(method, common), {})
        start = STARTS[common].partition(" ")[0]
        row[start, "accuracy"] = plus_minus(float(some["top1"].mean()), float(some["top1"].std()))
        row[start, "worst client"] = f"{some['worst_client'].mean():.1f}"
        if some["barrier"].notna().any():
            row[start, "barrier"] = f"{some['barrier'].mean():.2f}"
    order = dict.fromkeys(
        _row_name(method, common)
        for method in in_order(here["method"])
        for common in here["common"][here["method"] == method].unique()
    )
    table: Rows = pd.DataFrame.from_dict({name: found[name] for name in order}, orient="index")
    table.columns = pd.MultiIndex.from_tuples(table.columns)
    return captioned(
        table.sort_index(axis=1, level=0, sort_remaining=False, ascending=False).fillna(NOTHING),
        f"{int(here['clients'].max())} clients, concentration {usual:g}, one round ({whose(records)}): test accuracy "
        "of the server's model in percent, mean ± standard deviation over the seeds; accuracy at the worst client, in "
        "percent, on the classes that it has; and the mean loss barrier to the clients' aligned models, in nats. "
        "Clients had weights of their own at first, or common ones.",
        folded=True,
    )


def plot_concentrations(records: Sequence[Record]) -> Figure | None:
    """Accuracy after one round by how alike the clients' classes are; a panel for each start.

    Args:
        records: of ``federated`` at one profile.

    Returns:
        ``None`` if the records tell nothing of it.
    """
    rows = measured(records)
    once, alone = _merged_once(rows), _alone(rows)
    if once.empty:
        return None
    places = sorted(once["concentration"].unique())
    everywhere = once.groupby(["common", "method"], sort=False)["concentration"].nunique()
    starts = sorted(once["common"].unique())
    figure, axes = panels([4.2] * len(starts), sharex=True, sharey=True)
    told = []
    for axis, common in zip(axes, starts, strict=True):
        here = once[once["common"] == common]
        for number, method in enumerate(in_order(here["method"])):
            if everywhere[common, method] < len(places):
                continue
            means = here[here["method"] == method].groupby("concentration")["top1"].mean()
            merged = is_merged(method)
            axis.plot(
                means.index, means, color=method.color, label=_name(method), lw=1.4,
                ls=("-", "--", "-.")[number % 3] if merged else ":",
                marker="osD^vX"[number % 6] if merged else "", ms=5,
            )  # fmt: skip
        for name, level in alone.items():
            axis.axhline(level, color=FAMILIES["reference"], lw=0.8)
            axis.text(places[0], level, f" {name}", fontsize=9, va="bottom")
        axis.set_xscale("log")
        axis.set_xticks(places, [f"{place:g}" for place in places])
        axis.minorticks_off()
        axis.set(ylabel="test accuracy (%)")
        axis.set_title(STARTS[common])
        for place in (places[0], places[-1]):
            means = (
                here[here["concentration"] == place].groupby("method", sort=False)["top1"].mean()
            )
            merged = means[[is_merged(method) for method in means.index]]
            if len(merged):
                where = f"{STARTS[common].capitalize()}, concentration {place:g}"
                told.append(f"{where}: best {_name(merged.idxmax())} {merged.max():.1f} %")
    axes[-1].set_xlabel("concentration: from few classes a client to all alike")
    label_ends(axes, 24)
    return describe(figure, f"Accuracy after one round. {'. '.join(dict.fromkeys(told))}", told[0])


def plot_rounds(records: Sequence[Record]) -> Figure | None:
    """Accuracy and the worst client's by rounds, and so by bytes, at the same epochs in all.

    Args:
        records: of ``federated`` at one profile.

    Returns:
        ``None`` if the records tell nothing of it.
    """
    rows = _rounds(measured(records))
    if rows.empty:
        return None
    counts = sorted(rows["rounds"].unique())
    sent = (rows["bytes_up"] + rows["bytes_down"]).groupby(rows["rounds"]).mean() / MIB
    figure, axes = panels([3.2, 3.2], sharex=True)
    for axis, metric, title in zip(
        axes, ("top1", "worst_client"), ("test accuracy (%)", "worst client (%)"), strict=True
    ):
        for name, (label, family, line) in STRATEGIES.items():
            here = rows[rows["method"] == name].groupby("rounds")[metric].agg(["mean", "std"])
            if len(here):
                axis.plot(
                    here.index, here["mean"], line, marker="o", ms=5, color=FAMILIES[family],
                    label=label,
                )  # fmt: skip
                spread = here["std"].fillna(0)
                axis.vlines(
                    here.index, here["mean"] - spread, here["mean"] + spread,
                    color=FAMILIES[family], lw=1,
                )  # fmt: skip
        axis.set_title(title)
    axes[-1].set_xscale("log")
    axes[-1].set_xticks(counts, [f"{count}\n{sent[count]:.1f} MiB" for count in counts])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("rounds, and what all clients send and get")
    label_ends(axes, 20)
    means = rows.groupby(["rounds", "method"], sort=False)["top1"].mean()
    best = {count: means[count].idxmax() for count in counts}
    told = [
        f"{_counted(count)}: {STRATEGIES[name][0]} {means[count][name]:.1f} %"
        for count, name in best.items()
    ]
    return describe(figure, "Accuracy by rounds and bytes", f"The best of {', '.join(told)}")


def plot_clients(records: Sequence[Record]) -> Figure | None:
    """Accuracy and memory by the number of clients, for methods that were run with each; a panel for each start.

    Args:
        records: of ``federated`` at one profile.

    Returns:
        ``None`` if the records tell nothing of it.
    """
    rows = measured(records)
    rows = rows[rows["federated"] & (rows["concentration"] == _usual(rows))]
    counts = sorted(rows["clients"].unique())
    memory = rows[~rows["common"] & rows["peak_mib"].notna()]
    if len(counts) < 2 or not any(_everywhere(memory, "clients", len(counts))):
        return None
    starts = sorted(rows["common"].unique())
    figure, axes = panels([2.8] * len(starts) + [2.8], sharex=True)
    for axis, common in zip(axes, starts, strict=False):
        for method, here in _everywhere(rows[rows["common"] == common], "clients", len(counts)):
            _by_clients(axis, method, here, "top1")
        axis.set_title(f"{STARTS[common]}: test accuracy (%)")
    ends = []
    for method, here in _everywhere(memory, "clients", len(counts)):
        _by_clients(axes[-1], method, here, "peak_mib")
        values = here.groupby("clients")["peak_mib"].mean()
        few, many = (f"{values.iloc[k]:.1f}" for k in (0, -1))
        ends.append(f"{_name(method)} {few if few == many else f'{few} to {many}'} MiB")
    axes[-1].set_title(f"{STARTS[False]}: memory of the merge (MiB)")
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xticks(counts, [str(count) for count in counts])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("clients")
    label_ends(axes)
    title = f"From {counts[0]} to {counts[-1]} clients the merge takes {listed(ends)}"
    return describe(figure, "Accuracy and memory by the number of clients", title)


def _everywhere(rows: Rows, column: str, count: int) -> Iterator[tuple[Combination, Rows]]:
    """The methods that were run with every value of a column, in the registry's order."""
    for method in in_order(rows["method"]):
        here = rows[rows["method"] == method]
        if here[column].nunique() == count:
            yield method, here


def _by_clients(axis: Axes, method: Combination, rows: Rows, metric: str) -> None:
    found = rows.groupby("clients")[metric].agg(["mean", "std"]).fillna(0)
    mean, spread = found["mean"], found["std"]
    line, marker = ("-", "o") if is_merged(method) else (":", "")
    name = METHODS[method.aggregate].label if is_merged(method) else method.label
    axis.plot(found.index, mean, line, marker=marker, ms=5, color=method.color, label=name)
    if marker:
        axis.vlines(found.index, mean - spread, mean + spread, color=method.color, lw=1)


def plot_fairness(records: Sequence[Record]) -> Figure | None:
    """The worst client against the mean client after one round; on the diagonal all clients get the same.

    Args:
        records: of ``federated`` at one profile.

    Returns:
        ``None`` if the records tell nothing of it.
    """
    rows = measured(records)
    once = _merged_once(rows)
    if once.empty:
        return None
    here = once[once["concentration"] == _usual(rows)]
    starts = sorted(here["common"].unique())
    figure, axes = panels([3.6] * len(starts), sharex=True, sharey=True)
    told = []
    for axis, common in zip(axes, starts, strict=True):
        means = _means(here[here["common"] == common])
        merged = means[[is_merged(method) for method in means.index]]
        fairest = merged["worst_client"].idxmax()
        axis.plot([0, 100], [0, 100], color="black", alpha=0.3, lw=0.8)
        for method, row in means.iterrows():
            named = method in (fairest, BASE, ENSEMBLE)
            axis.plot(
                row["mean_client"], row["worst_client"], "D" if not is_merged(method) else "o",
                color=method.color, ms=8 if named else 5, alpha=0.85,
                label=f"{_name(method)} {row['worst_client']:.0f}" if named else None,
            )  # fmt: skip
        axis.set(ylabel="worst client (%)")
        axis.set_title(STARTS[common])
        worst, average = (merged[name][fairest] for name in ("worst_client", "mean_client"))
        told.append(
            f"{STARTS[common].capitalize()}: {_name(fairest)} has {worst:.1f} % at its worst client and "
            f"{average:.1f} % on average"
        )
    axes[-1].set_xlabel("mean client (%)")
    label_ends(axes, 22)
    return describe(figure, ". ".join(told), told[0])


def rounds_table(records: Sequence[Record]) -> pd.DataFrame:
    """A row a strategy, a column a number of rounds: accuracy, and the worst client's in brackets.

    Args:
        records: of ``federated`` at one profile.
    """
    rows = _rounds(measured(records)).sort_values("rounds")
    cells: dict[str, dict[str, str]] = {}
    for (name, count), here in rows.groupby(["method", "rounds"], sort=False):
        mean, spread = float(here["top1"].mean()), float(here["top1"].std())
        text = f"{plus_minus(mean, spread)} ({here['worst_client'].mean():.1f})"
        cells.setdefault(name, {})[_counted(count)] = text
    order = [name for name in STRATEGIES if name in cells]
    table = pd.DataFrame.from_dict({STRATEGIES[n][0]: cells[n] for n in order}, orient="index")
    return captioned(
        table.fillna(NOTHING),
        "Test accuracy in percent after all rounds, mean ± standard deviation over the seeds, and in brackets that at "
        f"the worst client; every client makes the same epochs in all ({whose(records)}).",
    )
