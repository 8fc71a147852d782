"""Shell completion, driven by the shell's own protocol."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def complete(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """complete("tiler render --model dr") → what bash is offered for the last word."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(line: str) -> list[str]:
        with monkeypatch.context() as patch:
            for name, value in {
                "_TILER_COMPLETE": "complete_bash",
                "COMP_WORDS": line,
                "COMP_CWORD": str(len(line.split(" ")) - 1),
            }.items():
                patch.setenv(name, value)
            return in_process().out.split()

    return run


def test_models_are_completed_by_their_names(complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "dream.safetensors",
        "sub/drum.gguf",
        "a/twin.safetensors",
        "b/twin.safetensors",
        "dr/model_index.json",
    ):
        (tmp_path / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / name).touch()
    (tmp_path / "hub/models--org--dr-name").mkdir(parents=True)
    monkeypatch.setenv("TILER_MODEL_DIRS", str(tmp_path / "models"))
    assert complete("tiler render --model dr") == ["dr", "dream", "drum"]
    assert complete("tiler plan -m m") == ["mini"]
    assert complete("tiler doctor --model org/") == ["org/dr-name"]
    assert complete("tiler render --model /") == [str(tmp_path / f"models/{n}/twin.safetensors") for n in "ab"]
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras/paper.safetensors").touch()
    monkeypatch.setenv("TILER_LORA_DIRS", str(tmp_path / "loras"))
    assert complete("tiler render --lora pa") == ["paper"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/drift.safetensors").touch()
    assert complete(f"tiler render --model-dir {tmp_path / 'other'} --model dr") == ["drift"]


def test_a_configuration_that_is_wrong_completes_nothing(
    complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text("model_dirs = 3")
    monkeypatch.setenv("TILER_CONFIG", str(tmp_path / "c.toml"))
    assert complete("tiler render --model m") == []


def test_completion_imports_no_torch(tiler) -> None:
    words = {"_TILER_COMPLETE": "complete_bash", "COMP_WORDS": "tiler render --model m", "COMP_CWORD": "3"}
    ran = tiler(env=words | {"PYTHONPROFILEIMPORTTIME": "1", "PYTHONPATH": ":".join(sys.path)})
    assert ran.out.split() == ["mini"]
    assert "tiler.cli.completion" in ran.err
    assert " torch\n" not in ran.err


def test_completion_is_installed_for_a_shell(tiler, tmp_path: Path) -> None:
    ran = tiler("--install-completion", "bash", env={"HOME": str(tmp_path)})
    assert ran.code == 0, ran.err
    assert "_TILER_COMPLETE=complete_bash" in (tmp_path / ".bash_completions/tiler.sh").read_text()
    assert "tiler.sh" in (tmp_path / ".bashrc").read_text()
