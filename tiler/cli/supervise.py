"""The process of a queue, which `tiler batch` and `tiler render --count` turn into after all checks. It lives while
pictures are drawn, so it knows no options and does not import the code that reads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from tiler.cli import failure
from tiler.cli.listening import Listener
from tiler.cli.terminal import duration, harmless, prepare_signals, prepare_streams
from tiler.errors import Interrupted, TilerError
from tiler.jobs.checked import Checked, Tally
from tiler.jobs.drawing import NOTED, end, popen
from tiler.jobs.queue import NoCluster, Queue, Together
from tiler.jobs.results import DONE, SKIPPED, Results
from tiler.jobs.temporary import own_folder

_HOSTED = "local", "listen"  # clusters whose scheduler belongs to the queue
_LEAVING = 30.0  # seconds in which the workers of a queue end


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The arguments of a queue's process. Its rows are read from the descriptor `rows`, a JSON object each; if that is
    -1, `reader` holds the arguments for reading them from a file."""

    root: str
    results: str
    file: str
    max_ram_bytes: int
    rows: int = -1
    reader: dict[str, Any] | None = None
    shared: bool = False
    fail_fast: bool = False
    silent: bool = False  # print nothing for people on stderr
    quiet: bool = False
    json_output: bool = False
    is_batch: bool = False  # end with a summary
    forgets: bool = False  # remove the results file once all pictures are finished
    cluster: str = ""  # where the tiles of several pictures at a time are predicted
    keys: str = ""
    insecure: bool = False
    threads: int = 0  # of each process; 0 if none were given
    log_json: bool = False


def main() -> None:
    """Entry point; the argument is a Spec as JSON."""
    prepare_streams()
    prepare_signals()
    try:
        spec = Spec(**json.loads(sys.argv[1]))
        if not spec.is_batch:  # whose rows have options of their own
            os.environ[NOTED] = "1"
        code = run(spec)
        sys.stdout.flush()
    except BaseException as error:
        failure.end(error)
    sys.exit(code)


def run(spec: Spec) -> int:
    """Draw all rows. Return the exit code. Raises TilerError and Interrupted."""
    path, say, noun = Path(spec.results), _speaker(silent=spec.silent), "row" if spec.is_batch else "picture"
    with ExitStack() as stack:
        queue = Queue(
            root=Path(spec.root),
            results=Results(path, os.path.basename(spec.file), shared=spec.shared),
            max_ram_bytes=spec.max_ram_bytes,
            shared=spec.shared,
            fail_fast=spec.fail_fast,
            encode=_encoder(spec),
            say=say,
            warn=_speaker(silent=False),
            finished=_printer(
                quiet=spec.quiet or spec.is_batch,
                json_output=spec.json_output,
                ceiling_bytes=spec.max_ram_bytes,
                shares=bool(spec.cluster),
            ),
            tally=Tally(noun=noun),
            together=partial(_together, spec, stack, say) if spec.cluster else None,
            hear=Listener(_speaker(silent=False), silent=spec.silent, as_json=spec.log_json, noun=noun).hear
            if spec.cluster
            else None,
        )
        tally = queue.run(_rows(spec))
    if spec.is_batch and not spec.quiet:
        print(str(tally) or f"{spec.file}: no rows")
        if tally.statuses[DONE]:
            print(f"results: {path}")
    if spec.forgets and not tally.codes:
        path.unlink(missing_ok=True)
    if not spec.is_batch and not spec.silent and (skipped := tally.statuses[SKIPPED]):
        was = "picture was" if skipped == 1 else "pictures were"
        print(f"{skipped} {was} finished already: skipped", file=sys.stderr)
    return tally.exit_code


def sentence(report: dict[str, Any], ceiling_bytes: int = 0, *, shares: bool = False) -> str:
    """The line that is printed for a finished picture. In a queue, `ceiling_bytes` were given for all processes; if the
    picture `shares` them with other pictures, its share is named too."""
    own = report["max_ram_bytes"]
    of = f"{own / 1e6:,.0f} MB, its share of {ceiling_bytes / 1e6:,.0f} MB"
    return (
        f"{report['output']}: {report['width']}×{report['height']}, seed {report['seed']}, "
        f"peak {report['peak_rss_bytes'] / 1e6:,.0f} MB of {of if shares else f'{(ceiling_bytes or own) / 1e6:,.0f} MB'}, "
        f"in {duration(report['seconds'])}"
    )


def _rows(spec: Spec) -> Iterator[Iterator[Checked]]:
    if spec.reader is None:
        with os.fdopen(spec.rows, "rb") as file:
            file.seek(0)
            yield (_checked(line) for line in file)
        return
    place: dict[str, int] = {"at": 0, "index": 0}
    while True:
        with tempfile.TemporaryFile() as file:
            place = _read(spec.reader | place, file)
            if not place["rows"]:
                return
            yield (_checked(file.readline()) for _ in range(place["rows"]))


def _checked(line: bytes) -> Checked:
    return Checked(**json.loads(line))


def _read(asked: dict[str, Any], file: IO[bytes]) -> dict[str, int]:
    """Have a short-lived process read and check the next rows into `file`. Return how many there are, and where the
    next ones start."""
    told = _run("tiler.cli.reader", asked, file)
    file.seek(0)
    place: dict[str, int] = json.loads(told)
    return place


def _run(module: str, asked: Any, rows: IO[bytes] | None = None) -> bytes:
    """Run a module and return what it prints. If it fails, it has printed why; raises SystemExit with its exit code."""
    given: dict[str, Any] = {} if rows is None else {"pass_fds": (rows.fileno(),)}
    said = asked if rows is None else asked | {"rows_fd": rows.fileno()}
    process = popen([sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **given)
    try:
        told, _ = process.communicate(json.dumps(said).encode())
    except (Interrupted, KeyboardInterrupt) as stop:
        end(process, int(stop.code or 0) - 128 if isinstance(stop, Interrupted) else 2)
        raise
    if process.returncode:
        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    return told


def _together(spec: Spec, stack: ExitStack, say: Callable[[str], None], row: Checked) -> Together:
    """Divide the ceiling by what the plan of a row says, and start what belongs to this queue of its cluster: it ends
    with `stack`. Raises TilerError."""
    asked = {
        "max_ram_bytes": spec.max_ram_bytes, "words": list(row.words), "cluster": spec.cluster, "keys": spec.keys,
        "insecure": spec.insecure, "threads": spec.threads,
    }  # fmt: skip
    words = ["--log-json"]
    with ExitStack() as starting:  # what has started ends at once if the rest cannot
        process: subprocess.Popen[bytes] | None = None
        if spec.cluster.partition(":")[0] in _HOSTED:  # it imports dask while the row is planned
            asked |= {"folder": str(starting.enter_context(own_folder("tiler-cluster-")))}
            process = starting.enter_context(_asking("tiler.cli.host"))
        try:
            with _asking("tiler.cli.shares", asked) as planner:
                shares = _answer(planner)
        except _Refused as error:
            if spec.is_batch:
                raise
            raise NoCluster(str(error), error.exit_code) from error  # the other pictures differ in their seeds alone
        if process is not None:
            _ask(process, asked | {"worker_bytes": shares["worker_bytes"]})
            try:
                host = _answer(process)
            except _Refused as error:
                raise NoCluster(str(error), error.exit_code) from error
            stack.push(starting.pop_all())
    if process is not None:
        words += [f"--cluster={host['address']}", *([f"--keys={host['keys']}"] if host["keys"] else [])]
        if not shares["worker_bytes"]:
            say(f"waiting for workers at {host['address']}")
    return Together(int(shares["most"]), int(shares["room_bytes"]), words)


class _Refused(TilerError):
    """An error that another process has told of."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def _asking(module: str, asked: dict[str, Any] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module that is asked a JSON object on a line of its standard input, now or later by `_ask`, and ends with
    its standard input at the latest."""
    process = popen(
        [sys.executable, "-m", module, "--json"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        if asked is not None:
            _ask(process, asked)
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_LEAVING)
        except BaseException:
            process.kill()
            raise
        process.stdout.close()


def _ask(process: subprocess.Popen[bytes], asked: dict[str, Any]) -> None:
    assert process.stdin is not None
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(asked).encode() + b"\n")
        process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """The JSON object with which a process answers. Raises TilerError with its error."""
    assert process.stdout is not None
    try:
        said: dict[str, Any] = json.loads(process.stdout.readline())
    except ValueError:
        said = {"error": "a process of the queue ended without a word", "exit_code": TilerError.exit_code}
    if "error" in said:
        raise _Refused(str(said["error"]), int(said["exit_code"]))
    return said


def _encoder(spec: Spec) -> Callable[[list[Checked]], None]:
    def encode(rows: list[Checked]) -> None:
        with suppress(SystemExit):  # each row can still encode its own prompts
            _run("tiler.cli.ahead", {"max_ram_bytes": spec.max_ram_bytes, "rows": [row.words for row in rows]})

    return encode


def _speaker(*, silent: bool) -> Callable[[str], None]:
    """A function that prints a line for people on stderr."""
    return (lambda text: None) if silent else (lambda text: print(harmless(text), file=sys.stderr, flush=True))


def _printer(*, quiet: bool, json_output: bool, ceiling_bytes: int, shares: bool) -> Callable[[dict[str, Any]], None]:
    if json_output:
        return lambda report: print(json.dumps(report), flush=True)
    return lambda report: None if quiet else print(sentence(report, ceiling_bytes, shares=shares), flush=True)


def command_line(spec: Spec) -> list[str]:
    """The command that starts the process of a queue."""
    return [sys.executable, "-m", "tiler.cli.supervise", json.dumps(asdict(spec))]


if __name__ == "__main__":
    main()
