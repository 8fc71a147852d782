"""Feed what others may have written to the readers of files, and let coverage lead to odd corners: whatever the bytes
are, a reader gives a value or an error of tiler's own.

    pip install -e '.[fuzz]'
    python scripts/fuzz.py index --seconds 300
    python scripts/fuzz.py all --seconds 60      # one reader after another

Needs atheris. A file `crash-…` beside is the input that broke a reader; give it as an argument of --replay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path


def _watched() -> AbstractContextManager[object]:
    """Where this is the program, what is imported tells the fuzzer of its branches."""
    with suppress(ImportError):
        import atheris

        if __name__ == "__main__":
            return atheris.instrument_imports(include=["tiler"])
    return nullcontext()


with _watched():
    from tiler.errors import TilerError
    from tiler.jobs import manifest
    from tiler.jobs.rows import read_rows
    from tiler.output.infotext import parse_infotext
    from tiler.output.recipes import read_recipe
    from tiler.output.texts import read_texts
    from tiler.request.regions import read_regions
    from tiler.weights.index import read_index

Reader = Callable[[bytes, Path], None]


def _written(data: bytes, folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def index(data: bytes, folder: Path) -> None:
    """A weight file's header."""
    for info in read_index(_written(data, folder, "x.safetensors")).values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= len(data), info


def toml(data: bytes, folder: Path) -> None:
    """A queue, and a file of regions."""
    path = _written(data, folder, "x.toml")
    for read in (lambda: list(read_rows(path)), lambda: read_regions(path)):
        with suppress(TilerError):
            read()


def lines(data: bytes, folder: Path) -> None:
    """A queue of JSON lines, and one of prompts: what is wrong is its row's problem."""
    for name in ("x.jsonl", "x.txt"):
        for row in read_rows(_written(data, folder, name)):
            assert row.problem is None or "\n" not in row.problem


def infotext(data: bytes, folder: Path) -> None:
    """The parameters that a picture was made with."""
    text = data.decode("utf-8", "replace")
    parse_infotext(text)
    read_recipe({"parameters": text})


def texts(data: bytes, folder: Path) -> None:
    """A whole picture."""
    read_recipe(read_texts(_written(data, folder, "x.png")))


def job(data: bytes, folder: Path) -> None:
    """A job's manifest."""
    manifest.read(_written(data, folder, "job.json")).request()


READERS: dict[str, Reader] = {r.__name__: r for r in (index, toml, lines, infotext, texts, job)}


def seeds() -> dict[str, bytes]:
    """For each reader an input that it takes, for mutations to begin with."""
    header = json.dumps(
        {"__metadata__": {"a": "b"}, "x": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]}}
    ).encode()
    said = manifest.Manifest(
        said={"prompt": "a"}, picture={"seed": 1}, model_id="1", made_by={}, methods={}, precision="fp32", seed=1,
        begun="", max_ram_bytes=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        manifest.write(Path(name) / "job.json", said)
        written = (Path(name) / "job.json").read_bytes()
    words = b'"a boat"\nNegative prompt: fog\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 64x64, X: "{\\"a\\": [1]}"'
    chunk = b"tEXtparameters\0" + words
    picture = b"\x89PNG\r\n\x1a\n" + (len(chunk) - 4).to_bytes(4, "big") + chunk + b"\0\0\0\0"
    return {
        "index": len(header).to_bytes(8, "little") + header + b"\0\0\0\0",
        "toml": b'[defaults]\nsteps = 3\n[[image]]\nprompt = "a"\ncount = 2\n[[region]]\nprompt = "b"\nrows = [0, 64]\ncols = [0, 64]\n',
        "lines": b'{"prompt": "a", "seed": 3, "count": 2}\n--prompt "a b" --seed 3 --n_iter 2 --tiling true\nplain\n',
        "infotext": words,
        "texts": picture,
        "job": written,
    }


def take(reader: Reader, data: bytes, folder: Path) -> None:
    """Raises whatever is no error of tiler's own."""
    with suppress(TilerError):
        reader(data, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--replay", type=Path, help="one input, and no fuzzing")
    asked = parser.parse_args()
    if asked.reader == "all":
        codes = [
            subprocess.run([sys.executable, __file__, name, "--seconds", str(asked.seconds)], check=False).returncode
            for name in READERS
        ]
        sys.exit(max(codes))
    folder = Path(tempfile.mkdtemp(prefix="tiler-fuzz-"))
    try:
        if asked.replay is not None:
            take(READERS[asked.reader], asked.replay.read_bytes(), folder)
        else:
            _fuzz(asked.reader, asked.seconds, folder)
    finally:
        shutil.rmtree(folder)


def _fuzz(name: str, seconds: int, folder: Path) -> None:
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: pip install -e '.[fuzz]'")
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seeds()[name])
    pid = os.fork()  # libFuzzer ends its process by itself
    if not pid:
        options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2000", "-max_len=65536", "-verbosity=0"]
        atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: take(READERS[name], data, folder))
        atheris.Fuzz()
    _, status = os.waitpid(pid, 0)
    inputs = len(list(corpus.iterdir()))
    print(
        f"{name}: {seconds} s, {inputs} inputs of different coverage, {'BROKEN' if status else 'no crash'}", flush=True
    )
    if status:
        sys.exit(1)


if __name__ == "__main__":
    main()
