"""Where tasks are done, with Dask: on the workers of a cluster, of this machine, or of SLURM's jobs."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

KINDS = re.compile(r"(local|slurm):([1-9]\d{0,4})")
ADDRESS = re.compile(r"([a-z]+://)?[^\s/]+:\d+")
GPU = {"GPU": 1}
"""What a task asks of a worker that has a GPU to itself."""
POLL = 1.0
"""Seconds after which somebody looks whether there are other workers."""
PATIENCE = 20.0
"""Seconds until a scheduler has to answer."""


class ClusterError(RuntimeError):
    """A cluster that cannot be used, or no longer; cells that are finished are kept."""


def check_cluster(cluster: str | None, scheduler: str | None, workers: int | None = None) -> None:
    """Raise if there is no such cluster.

    Args:
        cluster: ``"local:N"`` or ``"slurm:N"``, N workers.
        scheduler: the address of a Dask scheduler.
        workers: how many there are to be without a cluster.

    Raises:
        ValueError: several are given, there is no such kind, or Dask or SLURM is not installed.
    """
    if cluster is None and scheduler is None:
        return
    if cluster is not None and scheduler is not None:
        raise ValueError(f"cluster is {cluster!r} and scheduler is {scheduler!r}: give one of them")
    if cluster is not None and not KINDS.fullmatch(cluster):
        raise ValueError(
            f"cluster is {cluster!r}: give local:N or slurm:N for N workers, or the address of a scheduler"
        )
    if scheduler is not None and not ADDRESS.fullmatch(scheduler):
        raise ValueError(f"scheduler is {scheduler!r}: give an address such as tcp://10.0.0.1:8786")
    if workers is not None:
        raise ValueError(f"workers is {workers}: a cluster has its own number, leave this out")
    if find_spec("distributed") is None:
        raise ValueError("a cluster needs Dask, which is not installed: pip install npmerge[dask]")
    if cluster is not None and cluster.startswith("slurm") and which("sbatch") is None:
        raise ValueError(f"cluster is {cluster!r}, but there is no sbatch: run this where SLURM is")


class Cluster(Executor):
    """Does jobs on the workers of a Dask cluster, one at a time each.

    A job whose worker dies is begun again on another one. What is being done ends when this process does, however it
    ends: the scheduler notices, and a worker that has a nanny begins afresh.

    Args:
        cluster: ``"local:N"`` starts N workers on this machine, each with a GPU of its own if there are any, which end
            with this process; ``"slurm:N"`` asks SLURM for N jobs, with what Dask's configuration says of them.
        scheduler: the address of one that is there already.
        on_gpu: whether jobs may use a GPU: then they go to workers that offer one, if there are such.

    Attributes:
        address: of the scheduler.

    Raises:
        ClusterError: no scheduler answers.
        ValueError: see :func:`check_cluster`.
    """

    def __init__(
        self, cluster: str | None = None, scheduler: str | None = None, *, on_gpu: bool = True
    ) -> None:
        check_cluster(cluster, scheduler)
        from distributed import Client

        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what is wrong is said once
        try:
            self._own = _started(cluster, on_gpu=on_gpu) if cluster else None
        except (OSError, RuntimeError) as error:
            raise ClusterError(f"the cluster {cluster} cannot be started: {error}") from error
        self.address = self._own.scheduler_address if self._own else scheduler
        try:
            self._client = Client(
                self.address, timeout=PATIENCE, set_as_default=False, name="npmerge"
            )
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no Dask scheduler answers at {self.address}: start one with `dask scheduler`, and "
                "workers with `dask worker ADDRESS --nthreads 1`"
            ) from error
        self._on_gpu, self._waiting = on_gpu, False
        self._wanted = int(cluster.split(":")[1]) if cluster and cluster.startswith("local") else 0
        self._begun: dict[Future[Any], Any] = {}

    @property
    def slots(self) -> int:
        """How many jobs can be done at a time now; one waits where there is no worker yet.

        Raises:
            ClusterError: the scheduler is gone, or a worker would do several jobs at a time.
        """
        return max(1, len(self.workers()))

    def workers(self) -> dict[str, dict[str, Any]]:
        """The workers that do jobs, by their addresses; of our own, those that are lost are begun afresh.

        Raises:
            ClusterError: the scheduler is gone, or a worker would do several jobs at a time.
        """
        if self._client.status != "running":
            raise self._gone()
        try:
            found: dict[str, dict[str, Any]] = self._client.scheduler_info(n_workers=-1)["workers"]
        except OSError as error:
            raise self._gone() from error
        if self._own is not None and len(found) < self._wanted:
            self._own.loop.add_callback(_mend, self._own)
        if not found and not self._waiting:
            log.info("%s has no worker now: waiting for one", self.address)
        self._waiting = not found
        if self._on_gpu:
            found = {k: v for k, v in found.items() if v["resources"].get("GPU")} or found
        for address, worker in found.items():
            if worker["nthreads"] > 1:
                raise ClusterError(
                    f"the worker {address} has {worker['nthreads']} threads, which would share one network's "
                    "settings: start workers with --nthreads 1, and as many as you want side by side"
                )
        return found

    def submit(self, job: Callable[..., T], /, *args: Any, **options: Any) -> Future[T]:
        """Begin a job.

        Its future has a ``BrokenExecutor`` if every worker that tried it died, and a :class:`ClusterError` if the
        scheduler is gone.
        """
        import dask

        offered = any(worker["resources"].get("GPU") for worker in self.workers().values())
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            remote = self._client.submit(
                _stoppable, partial(job, *args, **options), pure=False, retries=0,
                resources=GPU if self._on_gpu and offered else None,
            )  # fmt: skip
        future: Future[T] = Future()
        self._begun[future] = remote
        remote.add_done_callback(partial(self._ended, future))
        return future

    def result(self, job: Callable[..., T], /, *args: Any) -> T:
        """What a job gives, which is waited for."""
        future = self.submit(job, *args)
        while not wait([future], POLL).done:
            self.workers()  # which mends them
        return future.result()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002
        """Leave the cluster, which gives up what is not done yet; workers of our own end."""
        with suppress(OSError, TimeoutError):
            self._client.close(timeout=5)
        if self._own is not None:
            self._own.close(timeout=5)

    def _ended(self, future: Future[Any], remote: Any) -> None:
        from distributed.scheduler import KilledWorker

        del self._begun[future]
        error: BaseException | None = self._gone()
        if remote.status == "error":
            error = remote.exception()
        elif remote.status == "finished":
            with suppress(CancelledError, OSError):
                future.set_result(remote.result())
                return
        if isinstance(error, KilledWorker):
            error = BrokenExecutor(
                f"each of the {error.allowed_failures + 1} workers that tried it died (for want of memory, or "
                "killed by somebody)"
            )
        future.set_exception(error)

    def _gone(self) -> ClusterError:
        return ClusterError(
            f"the Dask scheduler {self.address} is gone: finished cells are kept, the same command goes on "
            "from there when there is one again"
        )


def slurm(
    *,
    cores: int = 4,
    gpus: int = 1,
    directives: Sequence[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """What ``dask_jobqueue.SLURMCluster`` is to be given so that each job is one worker with one GPU.

    What is not said here is as Dask's configuration says (``jobqueue.slurm``).

    Args:
        cores: of the CPU for a job.
        gpus: of a job, 1 or 0.
        directives: more of SLURM's options, e.g. ``["--constraint=a100"]``.
        options: more of ``SLURMCluster``'s, e.g. ``queue``, ``account``, ``memory``, ``walltime``, ``python`` and
            ``job_script_prologue``.

    Raises:
        ValueError: a job has several GPUs.

    Example:
        ``SLURMCluster(**slurm(queue="gpu", walltime="08:00:00")).adapt(minimum_jobs=8, maximum_jobs=8)``
    """
    import dask
    import dask_jobqueue  # noqa: F401 - reads its part of the configuration

    if gpus not in (0, 1):
        raise ValueError(f"gpus is {gpus}: a worker uses one, so ask for more jobs")
    known = dask.config.get("jobqueue.slurm")
    return {
        "memory": known["memory"] or "16GB",
        "cores": 1,  # of a worker, which does one cell at a time
        "processes": 1,
        "job_cpu": cores,
        "job_extra_directives": [
            *known["job-extra-directives"], *["--gres=gpu:1"] * gpus, *directives,
        ],
        "worker_extra_args": [*known["worker-extra-args"], *["--resources", "GPU=1"] * gpus],
        **options,
    }  # fmt: skip


def _started(cluster: str, *, on_gpu: bool) -> Any:
    """A cluster of our own."""
    kind, number = cluster.split(":")
    count = int(number)
    if kind == "slurm":
        from dask_jobqueue.slurm import SLURMCluster

        jobs = SLURMCluster(
            **slurm(gpus=int(on_gpu)), scheduler_options={"dashboard_address": ":0"}
        )
        jobs.adapt(minimum_jobs=count, maximum_jobs=count)  # another one for each that ends
        return jobs
    from distributed import Nanny, Scheduler, SpecCluster

    quiet = logging.CRITICAL
    gpus = _gpus() if on_gpu else []
    # A cell's tensors cannot be put aside, so a worker that waited for room would wait for ever.
    settings = {f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause")}
    workers = {}
    for k in range(count):
        options: dict[str, Any] = {
            "host": "127.0.0.1", "nthreads": 1, "dashboard": False, "silence_logs": quiet,
            "memory_limit": 1 / count, "config": settings,
        }  # fmt: skip
        if gpus:
            options["env"] = {"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]}
            options["resources"] = GPU
        workers[k] = {"cls": Nanny, "options": options}
    where = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"}
    scheduler = {"cls": Scheduler, "options": where}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=quiet, name="npmerge")


def _mend(own: Any) -> None:
    """Begin the workers afresh that Dask has given up, because they were long gone or died while they began."""
    from distributed import Status

    for name, worker in list(own.workers.items()):
        if worker.status in (Status.closed, Status.failed):
            del own.workers[name]
    own.scale(len(own.worker_spec))


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA calls them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [str(k) for k in range(count)] if given is None else given.split(",")[:count]


def _stoppable(job: Callable[[], T]) -> T:
    """In a worker: do a job, unless nobody waits for it any more.

    A thread cannot be stopped, so the process ends; its nanny begins it afresh.
    """
    from distributed import get_worker

    worker = get_worker()
    key, ended = worker.get_current_task(), threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                os._exit(1)

    if worker.nanny:
        threading.Thread(target=watch, daemon=True).start()
    try:
        return job()
    finally:
        ended.set()
