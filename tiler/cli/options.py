"""The options of all commands. Options of a request are derived from its fields; the others are defined here."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from tiler.cli import age, completion, layers
from tiler.cli.repeat import repeat
from tiler.cli.terminal import closed_streams
from tiler.errors import StorageError, UsageError
from tiler.jobs.drawing import NOTED
from tiler.request import Region, read_regions, shared
from tiler.request.choices import FORMATS, LOSSY, MAX_SEED, STDOUT, Format
from tiler.request.options import Option, Panel

MaxRam = Annotated[
    str,
    typer.Option(
        "--max-ram", "--budget", rich_help_panel=Panel.MEMORY, metavar="SIZE", show_default=False,
        help="Ceiling for the resident memory of the whole process, like 1.5GiB; auto: nine tenths of the memory "
        r"that is free now. [dim]\[default: 800MB][/dim]",
    ),
]  # fmt: skip
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        rich_help_panel=Panel.MEMORY,
        metavar="N",
        show_default=False,
        help=r"CPU threads. [dim]\[default: all cores][/dim]",
    ),
]
Nice = Annotated[
    int,
    typer.Option(
        "--nice", rich_help_panel=Panel.MEMORY, metavar="N", min=0, max=19,
        help="Lower the CPU priority, so that other programs go first; 19 is the lowest.",
    ),
]  # fmt: skip
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        rich_help_panel=Panel.OUTPUT,
        metavar="PATH",
        help="Write peak memory, times and counts to a JSON file. `seconds` count from the start of the program. Peaks "
        "are the kernel's VmHWM, reset between phases: /usr/bin/time, which reads it once at the end, may show less.",
    ),
]
OnDone = Annotated[
    str | None,
    typer.Option(
        "--on-done", rich_help_panel=Panel.OUTPUT, metavar="COMMAND", show_default=False,
        help="Shell command to run at the end, also after an error; TILER_OUTPUT and TILER_EXIT_CODE are set.",
    ),
]  # fmt: skip
LogJson = Annotated[
    bool,
    typer.Option(
        "--log-json",
        rich_help_panel=Panel.OUTPUT,
        help="Report progress on standard error as JSON, one event per line.",
    ),
]
From = Annotated[
    Path | None,
    typer.Option(
        "--from", rich_help_panel=Panel.PICTURE, metavar="IMG",
        help="Repeat a picture with the settings in its file, as `tiler info` shows them; options given here win. "
        "--preset replaces the picture's steps, strength, guidance interval and layout.",
    ),
]  # fmt: skip
Keys = Annotated[
    Path | None,
    typer.Option("--keys", metavar="FOLDER", help=shared.KEYS.help, envvar="TILER_KEYS", show_envvar=False),
]
Insecure = Annotated[bool, typer.Option("--insecure", help=shared.INSECURE.help)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=Panel.OUTPUT, help="Print errors only, no progress.")
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=Panel.OUTPUT, help="Print one JSON object on standard output.")
]


def command_of(
    request: type, run: Callable[..., None], *, leave_out: Iterable[str] = (), repeats: bool = False, tells: bool = True
) -> Callable[..., None]:
    """`run(request, **rest)` as a typer command. The fields of the dataclass `request` become options, except those in
    `leave_out`; `run`'s own keyword parameters follow. With `repeats`, the command takes --from. It
    prints notes on the options if it `tells` them and a queue has not done so."""
    own = [p for p in inspect.signature(run, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(request)
    offered = [f for f in fields(request) if "option" in f.metadata and f.name not in leave_out]

    def command(context: typer.Context, **given: Any) -> None:
        try:
            given = layers.settle(context, given, {p.name: p.default for p in parameters})
            rest = {p.name: given.pop(p.name) for p in own}
            picture = given.pop("from_picture", None)
            values, notes = _values(offered, given), list[str]()
            if picture is not None:
                all_fields = {f.name: f.default for f in fields(request) if "option" in f.metadata}
                found = repeat(
                    picture, layers.typed(context, given), all_fields, values.get("model_dirs", ()),
                    by_preset=layers.replaced(context, "preset"), repaints=values.get("repaint") is not None,
                )  # fmt: skip
                values |= found.values
                if "seeds" in rest and layers.layer_of(context, "seeds") is not layers.Layer.TYPED:
                    rest["seeds"] = None  # the picture's own seed is used
                notes += found.notes
            asked = request(**values)
            if picture is not None and not rest.get("quiet", False):
                notes.append(
                    f"settings that you do not give come from {picture}, also over your configuration; "
                    "`tiler info --json` lists them"
                )
            if layers.layer_of(context, "quality") is layers.Layer.TYPED and not _has_quality(asked):
                notes.append("--quality is for JPEG, WebP and AVIF; this format keeps every pixel")
            if tells and NOTED not in os.environ:
                for note in notes:
                    typer.echo(f"note: {note}", err=True)
            _check_folders(context, values)
            run(asked, **rest)
        except UsageError as error:
            for note in layers.sources(context, str(error)):
                error.add_note(note)
            raise

    parameters = [_parameter(f, hints[f.name]) for f in offered]
    parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in own]
    if repeats:
        parameters.append(
            inspect.Parameter("from_picture", inspect.Parameter.KEYWORD_ONLY, annotation=From, default=None)
        )
    order = list(Panel)
    parameters.sort(key=lambda p: order.index(Panel(_panel(p))))
    for parameter in parameters:
        _offer_in_environment(parameter.annotation.__metadata__[0])
    parameters.append(inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = run.__doc__
    return command


def _check_folders(context: typer.Context, values: Mapping[str, Any]) -> None:
    """Raise UsageError for typed folders that do not exist. Those of the environment and the configuration may: their
    disk may be absent today."""
    for name, option in ("lora_dir", "--lora-dir"), ("model_dirs", "--model-dir"):
        said = values.get(name) if layers.layer_of(context, name) is layers.Layer.TYPED else ()
        for folder in said if isinstance(said, tuple) else (said,):
            if not os.path.isdir(os.path.expanduser(folder)):  # Path.expanduser raises for unknown users
                raise UsageError(f"{option} {folder}: no such folder; check the path")


def _has_quality(request: Any) -> bool:
    """Whether the picture's format has a quality. True for unknown suffixes as for PNG: those are refused later."""
    suffix = "" if request.output is None else request.output.suffix.lower()
    return (request.format or FORMATS.get(suffix, Format.PNG)) in LOSSY


def in_environment(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command`, whose parameters are written out, with TILER_… variables for its options."""
    for hint in get_type_hints(command, include_extras=True).values():
        for info in getattr(hint, "__metadata__", ()):
            _offer_in_environment(info)
    return command


def _offer_in_environment(info: Any) -> None:
    """Let TILER_STEPS stand for --steps; arguments have no variable. typer keeps the first spelling as `default`."""
    if isinstance(info, typer.models.OptionInfo):
        names = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
        info.envvar, info.show_envvar = layers.variables(names) or None, False


def _panel(parameter: inspect.Parameter) -> str:
    return parameter.annotation.__metadata__[0].rich_help_panel or Panel.PICTURE


def _parameter(field: Field[Any], kind: Any) -> inspect.Parameter:
    """A field of a request as a parameter of a typer command."""
    option: Option = field.metadata["option"]
    shown: dict[str, Any] = {"help": _help(field), "rich_help_panel": option.panel.value, "show_default": False}
    shown["metavar"] = option.metavar or _metavar(kind)
    names = {"model": completion.model_names, "loras": completion.lora_names}
    if field.name in names:
        shown["autocompletion"] = names[field.name]
    default = field.default
    if kind == tuple[str, ...]:
        kind = list[str]
        default = MISSING if default is MISSING else []
    elif field.name == "regions":
        kind, default = Path | None, None
    elif option.many:
        kind, default = list[str], []
    elif option.parse is not None:
        kind, default = str | None, None
    elif option.off:
        kind, default = bool, False
    if not option.names:
        shown.pop("rich_help_panel")
        info = typer.Argument(**shown)
    else:
        info = typer.Option(*option.names, **shown)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info],
        default=inspect.Parameter.empty if default is MISSING else default,
    )  # fmt: skip


def _help(field: Field[Any]) -> str:
    """The help text, followed by the default, in rich's markup."""
    option: Option = field.metadata["option"]
    text, default = option.help.replace("[", r"\["), option.default
    if default is None and field.default not in (MISSING, None, False, ()) and not option.off:
        default = str(field.default)
    return text if default is None else rf"{text} [dim]\[default: {default}][/dim]"


def _metavar(kind: Any) -> str:
    """The placeholder for a value in the help. Short choices are listed instead."""
    kinds = [k for k in (*get_args(kind), kind) if k is not type(None)]
    for known, name in ((bool, ""), (int, "N"), (float, "X"), (Path, "PATH")):
        if known in kinds:
            return name
    choice = next((k for k in kinds if isinstance(k, type) and issubclass(k, StrEnum)), None)
    if choice is None:
        return "TEXT"
    joined = "|".join(choice)
    return joined if len(joined) <= 16 else "NAME"


def _values(offered: list[Field[Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """The request's values, parsed from the typed ones. Raises UsageError."""
    values = dict(given)
    for field in offered:
        option: Option = field.metadata["option"]
        typed = given[field.name]
        if field.name == "regions":
            prompt, values["regions"] = (None, tuple[Region, ...]()) if typed is None else read_regions(typed)
            values["prompt"] = prompt if given["prompt"] is None else given["prompt"]
        elif field.name == "seed" and typed is not None:
            if typed < -1:
                raise UsageError(f"--seed {typed} is out of range: 0–{MAX_SEED}, or -1 for a random one")
            values["seed"] = None if typed == -1 else typed
        elif option.many:
            assert option.parse is not None, field.name
            values[field.name] = tuple(map(option.parse, typed))
        elif option.parse is not None:
            if typed is None:
                del values[field.name]  # the field's own default holds
            else:
                values[field.name] = option.parse(typed)
        elif isinstance(typed, list):
            values[field.name] = tuple(typed)
        elif option.off:
            values[field.name] = not typed
    return values


def prepare_process(threads: int | None, *, torch: bool = True) -> None:
    """Set what must be set before torch is imported: the allocator, the threads, and quiet libraries. Then import
    torch, if `torch`. Raises UsageError."""
    from tiler.memory.lean_imports import start_program
    from tiler.memory.limits import check_user_limits, limited_cpus
    from tiler.memory.process import frugal_allocator

    try:
        os.getcwd()
    except OSError as error:  # otherwise Intel's library ends the process with a message of its own
        raise UsageError("the current folder does not exist any more; cd into another") from error
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"--threads {threads} is out of range: 1–1024")
    check_user_limits()
    frugal_allocator()
    threads = threads or (None if "OMP_NUM_THREADS" in os.environ else limited_cpus())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch:
        start_program()


def lower_priority(nice: int) -> None:
    """Let other programs go first."""
    if nice:
        os.nice(nice)


def check_report(report: Path | None, *outputs: Path | None, force: bool) -> None:
    """Check before any work that the report can be written, and that no other file has its name. Raises UsageError,
    StorageError."""
    if report is None:
        return
    from tiler.files import check_writable

    if any(output is not None and output.absolute() == report.absolute() for output in outputs):
        raise UsageError(f"{report}: --report and another output name the same file; give another name")
    check_writable(report, force=force, option="--report")


def check_preview(preview: Path | None, *, log_json: bool = False) -> None:
    """Check before any work that there is a terminal for a preview that goes to one. Raises UsageError."""
    if preview == STDOUT and (log_json or not sys.stderr.isatty()):
        raise UsageError("--preview - needs a terminal on standard error; give a file, such as --preview look.png")


def check_stdout(output: Path | None, *, json_output: bool) -> None:
    """If the picture goes to standard output, check before any work that nothing else does, and that it is open and no
    terminal. Raises UsageError, StorageError."""
    if output != STDOUT:
        return
    if json_output:
        raise UsageError("--json and -o - both use standard output; use --report FILE, or write the picture to a file")
    if 1 in closed_streams:
        raise StorageError("-o - writes to standard output, which is closed; add `| PROGRAM` or `> FILE`")
    if os.isatty(1):
        raise UsageError(
            "-o - writes a picture's bytes, and standard output is a terminal; add `| PROGRAM` or `> FILE`"
        )


def name_of(output: Path) -> str:
    """The name of an output for people."""
    return "standard output" if output == STDOUT else str(output)


def tell(facts: Mapping[str, Any], schema: int = 1) -> None:
    """Print the JSON object of --json. `schema` grows when a key changes its meaning or disappears."""
    typer.echo(json.dumps({"schema": schema, **facts}))


def finish(
    result: Any,
    say: Callable[[dict[str, Any]], str],
    *,
    report: Path | None = None,
    quiet: bool,
    json_output: bool,
) -> None:
    """Write the file of --report, if asked for, and print the pipeline's `result`: as JSON with --json, else as the
    line that `say` makes of its report, which goes to standard error if the picture itself went to standard output.
    Raises StorageError."""
    result.report["seconds"] = round(age(), 1)  # as the user waited
    if report is not None:
        from tiler.files import atomic

        with atomic(report) as file:
            file.write((json.dumps(result.report, indent=2) + "\n").encode())
    if json_output:
        tell({"output": str(result.output), **result.report})
    elif not quiet:
        typer.echo(say(result.report), err=result.output == STDOUT)
