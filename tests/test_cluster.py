"""Cells on a Dask cluster: the records of one process, whoever dies, whatever is shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import LocalCluster, WorkerPlugin
from kills import Killer, spawned
from processes import alive, needs_proc, until
from test_engine import FEW, Folders, few
from tiny import tiny_profile

from npmerge.cli import main
from npmerge.experiments import cells
from npmerge.report.machines import COLUMNS, cluster_findings
from npmerge.run import cluster, engine
from npmerge.run.cluster import Cluster, ClusterError, check_cluster, slurm
from npmerge.run.engine import CellsFailedError
from npmerge.run.sites import Site, do_there, look, marked
from npmerge.run.work import base_models
from npmerge.store.records import Outcome

pytestmark = needs_proc


@pytest.fixture(autouse=True)
def _tiny_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_profile(monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Four cells run in this process; for reading only."""
    folders = Folders.below(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        tiny_profile(patch)
        assert len(folders.run(pattern=FEW)) == 4
    return folders


@pytest.fixture(scope="module")
def two() -> Iterator[Cluster]:
    """Two workers on this machine."""
    pool = Cluster("local:2")
    yield pool
    pool.shutdown()


def run(folders: Folders, pool: Cluster | None, **options: Any) -> list[Path]:
    where = {} if pool is None else {"scheduler": pool.address}
    return folders.run(**{"workers": None, "pattern": FEW} | where | options)


def assert_as_undisturbed(folders: Folders, undisturbed: Folders) -> None:
    for name in few():
        assert folders.content(name) == undisturbed.content(name)
    assert {path.suffix for path in folders.files()} == {".json", ".safetensors"}
    assert not [path for path in folders.files() if path.name.startswith(".")]


def states(folders: Folders) -> Callable[[], set[str]]:
    """Asks for the states of the cells, in threads too."""
    todo = [cell for cell in cells("same_data", "tiny", [0]) if cell.name in few()]
    return lambda: {folders.records.state(cell) for cell in todo}


# The same records


def test_cells_on_a_cluster_give_the_records_that_they_give_here(
    two: Cluster, tmp_path: Path, undisturbed: Folders
) -> None:
    folders = Folders.below(tmp_path)
    assert [path.stem for path in run(folders, two)] == few()
    assert_as_undisturbed(folders, undisturbed)
    assert len(folders.models()) == 2
    assert list((folders.zoo / "artifacts").glob("*.safetensors"))
    assert folders.origin(few()[0])["threads"] == 1


def test_without_shared_folders_models_and_records_travel_with_the_cells(
    two: Cluster, tmp_path: Path, undisturbed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "marked", lambda *_: [tmp_path / "not" / "here"])
    folders = Folders.below(tmp_path)
    run(folders, two, pattern="*/permute-mean")
    models = {path: path.read_bytes() for path in folders.models()}
    assert len(models) == 2
    run(folders, two)
    assert_as_undisturbed(folders, undisturbed)
    assert {path: path.read_bytes() for path in folders.models()} == models  # not trained again
    assert not (folders.zoo / "artifacts").exists()  # those stay with the worker


def test_a_model_that_is_published_is_sent_and_not_trained(
    two: Cluster, tmp_path: Path, undisturbed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "marked", lambda *_: [tmp_path / "not" / "here"])
    folders = Folders.below(tmp_path)
    run(folders, two, models=undisturbed.zoo, pattern="*/permute-mean")
    assert folders.models() == []
    assert folders.content("permute-mean") == undisturbed.content("permute-mean")


def test_folders_are_shared_where_the_command_s_locks_are_seen(tmp_path: Path) -> None:
    with ExitStack() as stack:
        marks = marked(stack, [tmp_path / "results", tmp_path / "zoo"])
        assert look("cpu", [], [], marks).shared
        assert not look("cpu", [], [], [tmp_path / "elsewhere" / marks[0].name]).shared
    assert not look("cpu", [], [], marks).shared
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_scheduler_of_a_user_s_own_cluster_does(two: Cluster, tmp_path: Path) -> None:
    folders = Folders.below(tmp_path)
    where = ["--results", str(folders.results), "--zoo", str(folders.zoo), "--seeds", "0"]
    command = ["run", "same_data", "--profile", "tiny", "--cells", "*/ensemble", "--quiet"]
    assert main([*command, *where, "--scheduler", two.address, "--device", "cpu"]) == 0
    assert folders.states()["ensemble"] == "done"


# What dies


def test_killed_workers_cost_the_time_of_their_cells_and_nothing_else(
    two: Cluster, tmp_path: Path, undisturbed: Folders
) -> None:
    folders = Folders.below(tmp_path)
    now = states(folders)
    with Killer(lambda: spawned(os.getpid()), 3, busy=lambda: "running" in now()) as killer:
        run(folders, two)
    assert killer.killed
    assert_as_undisturbed(folders, undisturbed)


def test_a_worker_that_dask_has_given_up_is_begun_afresh() -> None:
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1ms"}):
        pool = Cluster("local:1")
        try:
            pid = pool.result(os.getpid)
            os.kill(pid, signal.SIGKILL)
            until(lambda: not pool._own.workers)
            assert pool.result(os.getpid) != pid
        finally:
            pool.shutdown()


class Greedy(WorkerPlugin):
    """Lets one cell ask for all the memory there is, and another one fail."""

    def setup(self, worker: Any) -> None:  # noqa: ARG002
        real = engine.do_cell

        def do(cell: Any, bench: Any) -> Outcome:
            if cell.name == "permute-np_merge":
                held = []
                for _ in range(100):
                    held.append(bytearray(os.urandom(1)) * 40_000_000)
                    threading.Event().wait(0.02)
                raise AssertionError(f"{len(held)} pieces fit")
            if cell.name == "permute-finetune":
                raise ArithmeticError("too hot")
            return real(cell, bench)

        engine.do_cell = do


def test_a_cell_beyond_the_memory_limit_or_with_an_error_fails_and_the_others_go_on(
    tmp_path: Path, undisturbed: Folders
) -> None:
    folders = Folders.below(tmp_path)
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        LocalCluster(
            1, threads_per_worker=1, memory_limit="1500MB", dashboard_address=None
        ) as small,
        small.get_client() as client,
    ):
        client.register_plugin(Greedy())
        with pytest.raises(CellsFailedError) as caught:
            run(folders, None, scheduler=small.scheduler_address)
    reasons = {label.rpartition("/")[2]: why for label, why in caught.value.failed.items()}
    assert reasons == {
        "permute-np_merge": "each of the 2 workers that tried it died (for want of memory, or killed by somebody)",
        "permute-finetune": "ArithmeticError: too hot",
    }
    for name in ("permute-mean", "permute-finetune-tuned"):
        assert folders.content(name) == undisturbed.content(name)


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A scheduler and a worker as programs of their own; the address and the scheduler."""
    file = tmp_path / "scheduler.json"
    dask_ = [sys.executable, "-m", "dask"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    where = ["--scheduler-file", str(file), "--no-dashboard"]
    first = [*dask_, "scheduler", "--host", "127.0.0.1", "--port", "0", *where]
    with subprocess.Popen(first, cwd=tmp_path, **quiet) as scheduler:
        until(lambda: file.exists() and file.stat().st_size, seconds=180)
        address: str = json.loads(file.read_text())["address"]
        with subprocess.Popen(
            [*dask_, "worker", "--nthreads", "1", *where], cwd=tmp_path, **quiet
        ) as worker:
            yield address, scheduler
            worker.terminate()
        scheduler.kill()


def test_a_scheduler_that_goes_away_ends_the_command_and_loses_no_finished_cell(
    apart: tuple[str, subprocess.Popen[bytes]], tmp_path: Path, undisturbed: Folders
) -> None:
    address, scheduler = apart
    folders = Folders.below(tmp_path)

    now = states(folders)

    def kill() -> None:
        until(lambda: {"done", "running"} <= now(), seconds=180)
        scheduler.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ClusterError, match=f"the Dask scheduler {address} is gone: finished cells"):
        run(folders, None, scheduler=address)
    killer.join()
    assert "done" in now()
    assert "failed" not in now()
    before = {
        name: folders.path(name).read_bytes() for name in few() if folders.path(name).exists()
    }
    folders.run(pattern=FEW)
    for name, content in before.items():
        assert folders.path(name).read_bytes() == content
    assert_as_undisturbed(folders, undisturbed)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_local_cluster_ends_with_the_command_however_it_ends(
    how: signal.Signals, tmp_path: Path
) -> None:
    folders = Folders.below(tmp_path)
    now = states(folders)
    with folders.start(workers=None, cluster="local:2") as process:
        until(lambda: "running" in now(), seconds=180)
        workers = spawned(process.pid)
        assert len(workers) >= 2
        process.send_signal(how)
        process.wait(timeout=20)
    until(lambda: not any(map(alive, workers)), seconds=10)
    assert set(folders.states().values()) <= {"missing", "done"}


def test_a_cell_whose_command_is_killed_ends_on_the_cluster_too(
    two: Cluster, tmp_path: Path
) -> None:
    mark = tmp_path / "begun"
    code = f"""
import os, pathlib, time
from npmerge.run.cluster import Cluster

def job():
    pathlib.Path({str(mark)!r}).write_text(str(os.getpid()))
    time.sleep(600)

Cluster(scheduler={two.address!r}).submit(job)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        until(lambda: mark.exists() and mark.read_text(), seconds=180)
        process.kill()
    pid = int(mark.read_text())
    until(lambda: not alive(pid), seconds=30)
    assert two.submit(os.getpid).result(60) != pid


# Who is refused


def test_a_worker_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    site = look("cpu", [], [])
    site.check_source()
    with pytest.raises(ClusterError, match=r"torch 1.0, .* has .*: let all compute alike"):
        replace(site, versions=site.versions | {"torch": "1.0"}).check_source()
    with pytest.raises(ClusterError, match="has npmerge's revision 0, this command has"):
        replace(site, revision="0").check_source()
    task = cells("same_data", "tiny", [0])[0]
    other = replace(site, kernels="cuda-sm_90")
    with pytest.raises(ClusterError, match=r"has kernels cpu.*, the first has cuda-sm_90"):
        do_there(lambda _: 1.0, "cpu", other, [], task)
    with pytest.raises(ClusterError, match=r"does not see .* as the first one did"):
        do_there(lambda _: 1.0, "cpu", site, [tmp_path / "mark"], task)
    assert do_there(lambda _: 1.0, "cpu", site, [], task) == 1


def test_a_site_names_base_models_as_they_are_called_there() -> None:
    bases = base_models(cells("same_data", "tiny", [0])[0])
    names: Site = look("cpu", [], bases)
    assert [name.partition("-cpu")[0] for name in names.names.values()] == [b.name for b in bases]


def test_a_worker_with_several_threads_is_refused(tmp_path: Path) -> None:
    quiet: dict[str, Any] = {"dashboard_address": None, "protocol": "tcp://"}
    with (
        LocalCluster(1, threads_per_worker=2, processes=False, **quiet) as wide,
        pytest.raises(ClusterError, match=r"has 2 threads.*: start workers with --nthreads 1"),
    ):
        run(Folders.below(tmp_path), None, scheduler=wide.scheduler_address)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "local:0"}, "cluster is 'local:0': give local:N or slurm:N"),
        ({"cluster": "cloud:9"}, "cluster is 'cloud:9': give local:N or slurm:N"),
        ({"cluster": "slurm:8"}, "cluster is 'slurm:8', but there is no sbatch"),
        ({"scheduler": "here"}, "scheduler is 'here': give an address"),
        ({"cluster": "local:2", "scheduler": "tcp://x:1"}, "give one of them"),
        ({"cluster": "local:2", "workers": 2}, "workers is 2: a cluster has its own number"),
    ],
)
def test_a_cluster_that_cannot_be_is_one_line(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "which", lambda _: None)
    with pytest.raises(ValueError, match=message) as caught:
        engine.run_experiments("same_data", profile="tiny", **options)
    assert "\n" not in str(caught.value)


def test_without_dask_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install npmerge\[dask\]"):
        check_cluster("local:2", None)
    check_cluster(None, None)


def test_a_scheduler_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    with pytest.raises(ClusterError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        Cluster(scheduler="tcp://127.0.0.1:9")


# GPUs and SLURM


def test_each_local_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    pool = Cluster("local:2")
    try:
        assert [w["resources"] for w in pool.workers().values()] == [{"GPU": 1}] * 2
        jobs = [pool.submit(os.getenv, "CUDA_VISIBLE_DEVICES") for _ in range(2)]
        assert {job.result(60) for job in jobs} <= {"0", "1"}
        seen = pool._client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        assert sorted(seen.values()) == ["0", "1"]
    finally:
        pool.shutdown()


SCRIPT = """\
#!/usr/bin/env bash

#SBATCH -J dask-worker
#SBATCH -p gpu
#SBATCH -A mine
#SBATCH -n 1
#SBATCH --cpus-per-task=4
#SBATCH --mem=30G
#SBATCH -t 08:00:00
#SBATCH --gres=gpu:1
#SBATCH --constraint=a100
module load cuda
python -m distributed.cli.dask_worker SCHEDULER --name dummy-name --nthreads 1 --memory-limit 29.80GiB --nanny \
--death-timeout 60 --resources GPU=1
"""


def test_a_job_of_slurm_is_one_worker_with_one_gpu() -> None:
    from dask_jobqueue.slurm import SLURMCluster

    options = slurm(
        queue="gpu", account="mine", memory="32GB", walltime="08:00:00", python="python",
        directives=["--constraint=a100"], job_script_prologue=["module load cuda"],
    )  # fmt: skip
    with SLURMCluster(**options, scheduler_options={"dashboard_address": ":0"}) as jobs:
        script = jobs.job_script().replace(jobs.scheduler_address, "SCHEDULER")
    assert script == SCRIPT
    with pytest.raises(ValueError, match="gpus is 2: a worker uses one"):
        slurm(gpus=2)


SBATCH = """#!/bin/sh
cp "$1" "$(dirname "$0")/job$$"
setsid sh "$(dirname "$0")/job$$" > /dev/null 2>&1 &
echo $! >> "$(dirname "$0")/jobs"
echo "Submitted batch job $!"
"""


def test_slurm_is_asked_for_jobs_which_end_with_the_command(
    tmp_path: Path, undisturbed: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With programs that stand for SLURM's: a job runs here, at once."""
    for name, text in (("sbatch", SBATCH), ("scancel", '#!/bin/sh\nkill -9 -- "-$1"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    folders = Folders.below(tmp_path / "run")
    run(folders, None, cluster="slurm:1", pattern="*/permute-mean")
    assert folders.content("permute-mean") == undisturbed.content("permute-mean")
    jobs = [int(line) for line in (tmp_path / "jobs").read_text().split()]
    assert jobs
    until(lambda: not any(map(alive, jobs)), seconds=30)


# The record of the kills


def test_the_record_of_the_kills_is_a_table(tmp_path: Path) -> None:
    path = tmp_path / "cluster.csv"
    assert "no record" in cluster_findings(path)
    path.write_text("x\n1\n")
    with pytest.raises(ValueError, match=r"cluster.csv is no record of cluster_kills.py"):
        cluster_findings(path)
    row = dict.fromkeys(COLUMNS, "1") | {"run": "one process", "compared": "52", "equal": "51"}
    path.write_text(f"{','.join(COLUMNS)}\n{','.join(row.values())}\n")
    assert "| one process | 1 | 1 | 1 | 51 of 52 | 1 |" in cluster_findings(path)
    with path.open("a") as file:
        file.write(",".join((row | {"compared": "2"}).values()))
    with pytest.raises(ValueError, match=r"cluster.csv has rows of several calls"):
        cluster_findings(path)
