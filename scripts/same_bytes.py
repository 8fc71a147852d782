"""Check that a change of the code changes no bit of what is rendered.

    python scripts/same_bytes.py record           # before the change: hash the latents and pictures of fixed seeds
    python scripts/same_bytes.py compare          # after it: a line for each case that differs; exit code 1 if any does
    python scripts/same_bytes.py compare --only shift
    python scripts/same_bytes.py record --full    # also an SD 1.5-size checkpoint: minutes more, 3 GB of disk
    python scripts/same_bytes.py list

The cases (same_bytes.txt) run `mini` and small random checkpoints (make_checkpoint.py) through the command line alone,
so the check outlives any move of the modules behind it. Bits depend on the processor's instruction set, on torch and on
the number of threads: the record holds a table of hashes for each such combination. Threads: OMP_NUM_THREADS, else all
cores.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CASES = Path(__file__).with_suffix(".txt")
RECORD = Path.home() / ".cache/tiler/same_bytes.json"
TIGHT = "--max-ram tight"  # stands for the smallest ceiling that `tiler plan` names, and a little
TIGHT_FACTOR = 1.03
PROMPT = "a red lighthouse above the sea"
REGIONS = """
prompt = "a quiet sea"
[[region]]
prompt = "a red lighthouse"
rows = [0, {72}]
cols = [{8}, {88}]
seed = 5
[[region]]
prompt = "a boat"
negative_prompt = "fog"
rows = [{24}, {88}]
cols = [{40}, {104}]
guidance_scale = 5
mask = "quartic"
mask_weight = 0.6
"""  # numbers in braces are pixels of a canvas with 64-px tiles

Hashes = dict[str, str]


class Case(NamedTuple):
    """One render, and one decode where `decode` holds options. `line` names the case in the record."""

    line: str
    model: str
    render: list[str]
    decode: list[str] | None

    def commands(self, number: int) -> list[list[str]]:
        """Command lines whose outputs are called after `number`."""
        shared = ["-m", self.model, "--quiet"]
        default = [] if "--steps" in self.render else ["--steps", "3"]
        picture, decoded, latents = f"{number}-picture.png", f"{number}-decoded.png", f"{number}-latents.safetensors"
        output = ["-o", picture, "--save-latents", latents, "--cache-dir", "packed"]
        found = [["render", PROMPT, "--seed", "7", *default, *self.render, *shared, *output]]
        if self.decode is not None:
            found.append(["decode", latents, *self.decode, *shared, "-o", decoded])
        return found


def cases(*, full: bool = False, only: str = "") -> list[Case]:
    """The cases whose line holds `only`; those of `sd15` belong to `full`."""
    found = []
    for line in CASES.read_text().splitlines():
        if line and not line.startswith("#") and only in line:
            render, _, decode = line.partition(" | ")
            model, *options = shlex.split(render)
            if full or model != "sd15":
                found.append(Case(line, model, options, shlex.split(decode) if decode else None))
    return found


def batches(chosen: list[Case]) -> list[list[int]]:
    """Which cases share a process: those of a model, because starting one takes longer than a small render; never two
    under a tight ceiling, which counts what earlier renders left in the process."""
    together: dict[str, list[int]] = {}
    for number, case in enumerate(chosen):
        key = case.line if TIGHT in case.line else case.model
        together.setdefault(key, []).append(number)
    return list(together.values())


def circumstances(threads: int) -> str:
    """What bits depend on besides the code: the record's key."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    flags = sorted(set(re.findall(r"\b(?:avx2|avx_vnni|avx512f|avx512_\w+|amx_\w+|asimd\w+|i8mm|bf16|sve\w*)\b", info)))
    return f"{platform.machine()} {' '.join(flags)}, torch {importlib.metadata.version('torch')}, {threads} threads"


def prepare(folder: Path, chosen: list[Case]) -> None:
    """Put the files that the cases name into `folder`, where they run."""
    import numpy as np
    from make_checkpoint import KINDS, make
    from PIL import Image

    rows, cols = np.mgrid[:150, :210]
    waves = [127 + 120 * np.sin(rows / (9 + 4 * i)) * np.cos(cols / (17 - 3 * i)) for i in range(3)]
    Image.fromarray(np.stack(waves, axis=-1).round().astype(np.uint8)).save(folder / "guide.png")
    for name, factor in ("regions.toml", 1), ("regions-256.toml", 4):
        text = re.sub(r"\{(\d+)\}", lambda match, factor=factor: str(factor * int(match[1])), REGIONS)
        (folder / name).write_text(text)
    for kind in KINDS:
        if any(kind in (case.model, *case.render, *(case.decode or [])) for case in chosen):
            (folder / kind).symlink_to(make(kind))


def tiler(*arguments: str) -> None:
    """Run the program in this process. Raises RuntimeError when it fails."""
    from tiler.cli.main import main

    err = io.StringIO()
    sys.argv = ["tiler", *arguments]
    with redirect_stdout(io.StringIO()), redirect_stderr(err):
        try:
            main()
        except SystemExit as done:
            if done.code:
                message = err.getvalue().strip().splitlines() or ["nothing on stderr"]
                raise RuntimeError(f"exit code {done.code}: {message[0]}") from None


def smallest_ceiling(options: list[str]) -> int:
    """What `tiler plan` names, in bytes. In a process of its own: planning leaves memory behind, which a later plan
    counts."""
    program = [sys.executable, "-c", "from tiler.cli.main import main; main()"]
    if "--save-latents" in options:  # an output that a plan does not have
        at = options.index("--save-latents")
        options = options[:at] + options[at + 2 :]
    options = [option for option in options if option != "--quiet"]
    done = subprocess.run([*program, "plan", *options, "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout)["smallest_max_ram_bytes"])


def work() -> None:
    """The other end of `run`: command lines on stdin, one list a line for each case; on stdout how each went, as
    JSON."""
    for line in sys.stdin:
        failure = None
        try:
            for command in json.loads(line):
                if "tight" in command:
                    plain = [word if word != "tight" else "800MB" for word in command]
                    smallest = smallest_ceiling(plain[1:])
                    command = [word if word != "tight" else str(int(TIGHT_FACTOR * smallest)) for word in command]
                tiler(*command)
        except Exception as error:
            failure = str(error) or repr(error)
        print(json.dumps(failure), flush=True)


def run(chosen: list[Case], threads: int) -> Iterator[tuple[Case, Hashes | str]]:
    """Each case with its hashes, or with the reason why it failed."""
    with tempfile.TemporaryDirectory(prefix="same_bytes.") as temporary:
        folder = Path(temporary)
        prepare(folder, chosen)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        for batch in batches(chosen):
            with subprocess.Popen(
                [sys.executable, __file__, "work"], cwd=folder, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            ) as worker:  # fmt: skip
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.writelines(json.dumps(chosen[number].commands(number)) + "\n" for number in batch)
                worker.stdin.close()
                for number in batch:
                    failure = json.loads(worker.stdout.readline() or '"the process died"')
                    yield chosen[number], failure or hashes(folder, number)


def hashes(folder: Path, number: int) -> Hashes:
    """SHA-256 of the latents' numbers and of the pictures' pixels, whatever the files say beside them."""
    from PIL import Image
    from safetensors.numpy import load_file

    latents = load_file(folder / f"{number}-latents.safetensors")["latents"]
    found = {"latents": hashlib.sha256(latents.tobytes()).hexdigest()}
    for name in "picture", "decoded":
        if (path := folder / f"{number}-{name}.png").exists():
            with Image.open(path) as picture:
                found[name] = hashlib.sha256(picture.convert("RGB").tobytes()).hexdigest()
    return found


def difference(was: Hashes | None, now: Hashes | str) -> str | None:
    """Why a case does not pass, None if it does."""
    if isinstance(now, str):
        return now
    if was is None:
        return "not in the record"
    changed = [name for name in was.keys() | now.keys() if was.get(name) != now.get(name)]
    return f"{' and '.join(sorted(changed))} changed" if changed else None


def load(path: Path) -> dict[str, dict[str, Hashes]]:
    """The record: hashes by circumstances and case."""
    found: dict[str, dict[str, Hashes]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record", "compare", "list", "work"], metavar="record|compare|list")
    parser.add_argument("--full", action="store_true", help="also the checkpoint of SD 1.5's size")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only the cases whose line holds this")
    parser.add_argument("--file", type=Path, default=RECORD, help=f"the record (default: {RECORD})")
    args = parser.parse_args()
    from tiler.native.library import has_bf16

    chosen = [case for case in cases(full=args.full, only=args.only) if "bf16" not in case.render or has_bf16()]
    if args.what == "work":
        work()
        return 0
    if args.what == "list":
        print(*(case.line for case in chosen), sep="\n")
        return 0
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    key, started, failed = circumstances(threads), time.monotonic(), 0
    known = load(args.file).get(key, {})
    for case, now in run(chosen, threads):
        if args.what == "record" and not isinstance(now, str):
            known[case.line] = now
        if (why := difference(known.get(case.line), now)) is not None:
            failed += 1
            print(f"{case.line}: {why}", flush=True)
    if args.what == "record":
        args.file.parent.mkdir(parents=True, exist_ok=True)
        args.file.write_text(json.dumps(load(args.file) | {key: known}, indent=1) + "\n")
    verb = "recorded in" if args.what == "record" else "compared with"
    print(f"{len(chosen)} cases {verb} {args.file}, {failed} failed, {time.monotonic() - started:.0f} s ({key})")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
