"""The user's folders in a process without a home: a container with an unknown user id."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tiler.errors import UsageError
from tiler.weights import places
from tiler.weights.packed import default_cache


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_caches_are_temporary(homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_cache().is_relative_to(tmp_path)
    assert places.hub_cache().is_relative_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache() == tmp_path / "x/tiler/packed"
    assert places.hub_cache() == tmp_path / "x/huggingface/hub"


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "~/hf"}, "~/hf/hub"),
        ({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}, "/hub"),
    ],
)
def test_the_hubs_cache_is_where_its_library_looks(variables: dict[str, str], want: str) -> None:
    code = "import huggingface_hub.constants as c; from tiler.weights.places import hub_cache; print(c.HF_HUB_CACHE); print(hub_cache())"
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE", "XDG_"))}
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=known | variables, timeout=120
    )
    assert ran.stdout.splitlines() == 2 * [os.path.expanduser(want)]


def test_a_path_below_an_unknown_home(homeless: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.expand("/a/b") == Path("/a/b")
    with pytest.raises(UsageError, match="write the whole path"):
        places.expand("~nobody-of-this-name/model")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user that nobody knows")
def test_doctor_and_hub_ids_work_for_a_user_that_nobody_knows() -> None:
    code = """
import os
os.environ.pop("HOME", None)
os.environ.update(HF_HUB_OFFLINE="1", HF_TOKEN_PATH="/none")
from tiler.cli.main import app
from tiler.errors import OfflineError
from tiler.weights.checkpoint import resolve
from tiler.weights.packed import default_cache
import torch, tiler.compute.cpu, tiler.memory.limits
from huggingface_hub import HfApi, snapshot_download  # before: this environment's folders may be closed to others
app(["doctor", "--json"], standalone_mode=False)
os.setgroups([])
os.setuid(54321)
print(default_cache())
app(["doctor", "--json"], standalone_mode=False)
try:
    resolve("org/never-downloaded")
except OfflineError as error:
    print("hf download org/never-downloaded" in str(error))
"""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=known, timeout=300)
    assert ran.returncode == 0, ran.stderr
    _, cache, facts, offline = ran.stdout.strip().splitlines()
    temporary = tempfile.gettempdir()
    assert cache == f"{temporary}/tiler-54321/tiler/packed"
    assert f"{temporary}/tiler-54321/huggingface/hub" in facts
    assert offline == "True"
