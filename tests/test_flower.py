"""The app in the book on Flower's own runtime: a SuperLink and two SuperNodes on this machine, and nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from processes import alive, children, needs_proc, until
from safetensors.torch import load_file

pytestmark = needs_proc

APP = Path(__file__).parents[1] / "book" / "_static" / "flower_app"
CLIENTS = 2
LIMIT = 240
"""Seconds that a busy machine may take."""
IN_PROCESS = f"""
import sys
from flwr.app import Context, RecordDict
from merging import client_app, server_app
from npmerge.federated import LocalGrid

config = {{"rounds": 1, "output": sys.argv[1]}}
server = Context(run_id=1, node_id=0, node_config={{}}, state=RecordDict(), run_config=config)
server_app.app(LocalGrid(client_app.app, {CLIENTS}), server)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [other for child in found for other in descendants(child)]


class Programs:
    """Flower's programs, each with a home of its own, without telemetry."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()

    def environment(self, home: str) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(self.folder / home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # not into the book
        }

    def start(self, home: str, *command: str) -> None:
        with (self.folder / f"{home}.log").open("wb") as log:
            self.started.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment(home), cwd=self.folder
                )
            )

    def logs(self) -> str:
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("*.log")))

    def end(self) -> None:
        mine = [pid for one in self.started for pid in (one.pid, *descendants(one.pid))]
        for one in reversed(self.started):
            one.terminate()
        for one in self.started:
            try:
                one.wait(20)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()
        until(lambda: not any(map(alive, mine)))


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Programs]:
    running = Programs(tmp_path)
    try:
        yield running
    finally:
        running.end()


def answers(url: str) -> bool:
    try:
        with closing(urlopen(url, timeout=1)) as answer:  # noqa: S310 - this machine's
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def test_the_app_in_the_book_makes_on_flowers_runtime_what_it_makes_in_one_process(
    programs: Programs, tmp_path: Path
) -> None:
    link, *nodes = free_ports(1 + CLIENTS)
    programs.start(
        "superlink", "flower-superlink", "--insecure", "--port", str(link),
        "--disable-runtime-dependency-installation",
    )  # fmt: skip
    for number, port in enumerate(nodes):
        programs.start(
            f"supernode{number}", "flower-supernode", "--insecure", "--port", str(port),
            "--superlink", f"127.0.0.1:{link}",
            "--node-config", f"partition-id={number} num-partitions={CLIENTS}",
        )  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    until(lambda: answers(f"http://127.0.0.1:{link}/health"), seconds=LIMIT)
    merged = tmp_path / "merged.safetensors"
    ran = subprocess.run(
        ["flwr", "run", str(APP), "here", "--run-config", f"rounds=1 output='{merged}'", "--stream"],
        env=programs.environment("home"), capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert merged.exists(), ran.stdout + programs.logs()

    here = tmp_path / "here.safetensors"
    subprocess.run(
        [sys.executable, "-c", IN_PROCESS, str(here)],
        env=programs.environment("home"), cwd=APP, check=True,
    )  # fmt: skip
    one, other = load_file(merged), load_file(here)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
