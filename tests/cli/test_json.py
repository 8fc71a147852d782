"""--json prints one object with a versioned schema on standard output, for every command and for errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tiler.cli.main import app


def commands(group: Any, *names: str) -> Iterator[tuple[str, Any]]:
    yield " ".join(names), group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


TELL = [name for name, c in commands(typer.main.get_command(app)) if any("--json" in p.opts for p in c.params)]
SMALL = "--size 64 --steps 1 --seed 1 --no-guide --model"
WORDS = {
    "render": f"a-boat {SMALL} MODEL -o x.png --save-latents z.safetensors",
    "plan": f"{SMALL} MODEL",
    "encode": "a-boat --model MODEL",
    "decode": "z.safetensors --model MODEL -o y.png",
    "quantize": "MODEL --cache-dir .",
    "info": "x.png",
    "models": ".",
    "doctor": "",
    "resume": "--list",
    "cache list": "--cache-dir .",
    "config show": "",
    "cluster status": "tcp://127.0.0.1:9 --insecure",
}


def test_every_command_that_prints_json_tells_its_schema(
    in_process, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.cluster.status.workers", lambda *args, **options: [])
    assert set(WORDS) == set(TELL)
    for name, words in WORDS.items():
        ran = in_process(*name.split(), *words.replace("MODEL", str(tiny)).split(), "--json")
        assert ran.code == 0, (name, ran.err)
        assert isinstance(ran.json["schema"], int), name
        failed = in_process(*name.split(), "--nonsense", "--json")
        assert (failed.code, failed.json["schema"], failed.json["exit_code"]) == (2, 1, 2), name


@pytest.mark.parametrize("name", ["jpg", "JPEG", ".jpg"])
def test_a_format_may_be_called_by_its_file_ending(in_process, name: str) -> None:
    ran = in_process("plan", "x", "--size", 64, "-o", "-", "--format", name)
    assert ran.code == 0, ran.err
    ran = in_process("plan", "x", "--size", 64, "-o", "-", "--format", "tif")
    assert ran.code == 2 and "a TIFF cannot be written to a pipe" in ran.err
    assert "unknown format 'bmp'" in in_process("plan", "x", "-o", "-", "--format", "bmp").err


def test_a_quality_that_nothing_has_is_noted_where_it_was_typed(in_process) -> None:
    def said(*options: object) -> bool:
        return "--quality is for" in in_process("plan", "x", "--size", 64, *options, env={"TILER_QUALITY": "80"}).err

    assert said("--quality", 70) and said("--quality", 70, "-o", "x.tif")
    assert (
        not said()
        and not said("--quality", 70, "-o", "x.jpg")
        and not said("--quality", 70, "-o", "-", "--format", "jpg")
    )
