"""Where numbers come from: the commit, the machine, the versions, and what they cost."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from npmerge.device import kernels_label, threads
from npmerge.store.origins import provenance, revision
from npmerge.store.records import Provenance

CPU = torch.device("cpu")


def test_provenance_names_revision_device_versions_and_cost() -> None:
    with threads(2):
        found = provenance(
            CPU, seconds=1.26, source="r1", precision="bfloat16", deterministic=True,
            base_models={"a": {"digest": "12ab"}},
        )  # fmt: skip
    assert found["revision"] == "r1"
    assert found["device"].startswith("CPU")
    assert found["kernels"] == kernels_label(CPU)
    assert found["threads"] == 2
    assert found["precision"] == "bfloat16"
    assert found["deterministic"] is True
    assert found["base_models"] == {"a": {"digest": "12ab"}}
    assert found["versions"]["torch"] == version("torch")
    assert found["seconds"] == 1.3
    assert found["peak_memory_mib"] > 10


def test_a_record_holds_all_of_it() -> None:
    found = provenance(CPU, seconds=1, source="r1")
    assert Provenance.model_validate(found).model_dump() == found


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_revision_is_the_commit_and_says_if_the_source_was_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "npmerge"
    source = package / "store" / "origins.py"
    source.parent.mkdir(parents=True)
    source.write_text("committed")
    monkeypatch.setattr("npmerge.store.origins.PACKAGE", package)
    (package / "method.py").write_text("committed")
    git(tmp_path, "init")
    assert revision() == "version 0.1.0"  # inside somebody else's repository
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert revision() == head
    (package / "method.py").write_text("changed")
    assert revision() == f"{head}+"


def test_outside_a_checkout_the_revision_is_the_package_s_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("npmerge.store.origins.PACKAGE", tmp_path)
    monkeypatch.delenv("NPMERGE_REVISION", raising=False)
    assert revision() == "version 0.1.0"
    monkeypatch.setenv("NPMERGE_REVISION", "abc123")  # of what the copy was made
    assert revision() == "abc123"
