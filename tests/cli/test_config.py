"""Configuration: the command line wins over the environment, which wins over the file, which wins over the default."""

from __future__ import annotations

import json
import tomllib
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer

from tiler.cli import config as show
from tiler.cli import layers
from tiler.cli.layers import Layer
from tiler.cli.main import app
from tiler.errors import UsageError
from tiler.request import QuantizeRequest, RenderRequest, settings
from tiler.request.settings import Kind
from tiler.weights.folders import files, find, model_files


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "config.toml"
    path.touch()
    monkeypatch.setenv("TILER_CONFIG", str(path))
    return path


@cache
def commands() -> Any:
    """Made once, because making it takes longer than the tests that use it."""
    return typer.main.get_command(app)


def read(*words: str) -> Any:
    """The context in which `tiler WORDS` would run."""
    group, seen = commands(), list[Any]()
    group.commands[words[0]].invoke = seen.append
    group.main(list(words), prog_name="tiler", standalone_mode=False)
    return seen[0]


def samples(parameter: Any) -> list[str]:
    """Three values of an option: for the file, the environment and the command line."""
    if parameter.is_flag:
        return ["true", "false", "true"]
    hint = {**get_type_hints(QuantizeRequest), **get_type_hints(RenderRequest)}.get(parameter.name, str)
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            words = list(kind)
            return [words[0], words[1], words[-1]]
    return ["11", "13", "17"]


def test_every_option_has_four_layers(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The complete table of precedence (default, configuration file, environment, command line), and `config show`."""
    group: Any = commands()
    checked = set()
    arguments = {"decode": ["x"], "quantize": ["x"], "encode": ["x"], "view": ["x"]}
    for command in ("render", "plan", "decode", "encode", "quantize", "doctor", "models", "view"):
        must = arguments.get(command, [])
        for parameter in group.commands[command].params:
            if parameter.param_type_name != "option" or not (keys := layers.keys(parameter.opts)):
                continue
            variable, (in_file, in_environment, typed) = f"TILER_{keys[-1].upper()}", samples(parameter)
            words = [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], typed]

            def value(expected: Layer, *words: str, parameter: Any = parameter, command=command, must=must) -> Any:
                context = read(command, *must, *words)
                assert layers.layer_of(context, parameter.name) is expected, parameter.name
                return context.params[parameter.name]

            def shown(keys: tuple[str, ...] = keys) -> str:
                return next(s.source for k, s in show._options(group, settings.read_config()) if k in keys)

            def meant(text: str, parameter: Any = parameter) -> Any:
                return parameter.process_value(None, (text,) if parameter.multiple else text)

            config.write_text("")
            default = value(Layer.DEFAULT)
            assert default == parameter.process_value(None, parameter.default)
            assert shown() == "default"
            config.write_text(f"{keys[0]} = {in_file if parameter.is_flag else json.dumps(in_file)}")
            assert value(Layer.CONFIG) == meant(in_file)
            assert shown() == str(config)
            monkeypatch.setenv(variable, in_environment)
            assert value(Layer.ENVIRONMENT) == meant(in_environment)
            assert shown() == variable
            assert value(Layer.TYPED, *words) == meant(typed)
            monkeypatch.delenv(variable)
            checked.add(parameter.name)
    assert {"num_inference_steps", "max_ram", "threads", "model", "metadata", "cache_dir"} <= checked


@pytest.mark.parametrize(
    ("config_text", "typed", "wanted"),
    [
        ("size = 64", ["--paper", "A9"], {"size": None, "paper": "A9"}),
        ("paper = 'A9'\nbleed = '3mm'", ["--size", "64"], {"paper": None, "bleed": None, "size": 64}),
        ("width = 64", ["--size", "128"], {"width": None, "size": 128}),
        ("steps = 30", ["--preset", "fast"], {"num_inference_steps": None}),
        ("steps = 30\npreset = 'fast'", [], {"num_inference_steps": 30}),
        ("layout = 'shift'", ["--overlap", "64"], {"layout": None, "overlap": 64}),
    ],
)
def test_what_is_typed_overrules_what_contradicts_it(
    config: Path, config_text: str, typed: list[str], wanted: dict[str, object]
) -> None:
    config.write_text(config_text)
    context = read("plan", "a boat", *typed)
    given = layers.settle(context, context.params, {p.name: p.default for p in context.command.params})
    assert wanted.items() <= given.items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stps = 3", "unknown key 'stps'; did you mean steps?"),
        ("steps = 3.5", "steps = '3.5'"),
        ("steps = [3]", "wrong type"),
        ("mask = 'round'", "mask = 'round'"),
        ("guidance_scale = 3\ncfg_scale = 4", "the same option"),
        ("force = true", "unknown key 'force'"),
        ("= broken", "not valid TOML"),
        ("strength = 1.5", "--strength comes from"),
    ],
)
def test_a_bad_file_is_exit_2_and_named(in_process, config: Path, text: str, message: str) -> None:
    config.write_text(text)
    ran = in_process("plan", "a boat")
    assert ran.code == 2, ran.err
    assert message in ran.err and str(config) in ran.err and "Traceback" not in ran.err


def test_a_bad_variable_is_named(in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILER_STEPS", "many")
    ran = in_process("plan", "a boat")
    assert ran.code == 2 and "TILER_STEPS = 'many': not a whole number" in ran.err


def test_show_says_where_each_value_comes_from(in_process, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('steps = 7\nmodel = "x"\nmodel_dirs = ["m"]')
    monkeypatch.setenv("TILER_STEPS", "9")
    ran = in_process("config", "show", "--json")
    options, folders = ran.json["options"], ran.json["folders"]
    assert options["steps"] == {"value": "9", "source": "TILER_STEPS"}
    assert options["model"] == {"value": "x", "source": str(config)}
    assert options["max_ram"] == {"value": "800MB", "source": "default"}
    assert options.keys().isdisjoint({"list", "once", "measure", "share", "fail_fast", "no_browser", "name"})
    assert folders["model_dirs"]["value"] == [str(config.parent / "m")]
    lines = in_process("config", "show").out.splitlines()
    assert f"{'steps':22}9  (from TILER_STEPS)" in lines and f"{'max_ram':22}800MB  (default)" in lines
    assert all(line.endswith(")") or line.strip().startswith("→") for line in lines)
    assert in_process("config", "path").out == f"{config}\n"


def test_edit_makes_a_file_that_can_be_read(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILER_CONFIG", str(tmp_path / "new/config.toml"))
    monkeypatch.setenv("VISUAL", "cat")
    assert in_process("config", "edit").code == 0
    assert settings.read_config() == {}
    lines = (tmp_path / "new/config.toml").read_text().splitlines()
    (tmp_path / "new/config.toml").write_text("\n".join(line[2:] for line in lines if " = " in line))
    assert in_process("config", "show").code == 0  # what it shows as comments may stand there
    monkeypatch.setenv("VISUAL", "no-such-editor")
    assert in_process("config", "edit").code == 2


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_folders_of_other_programs_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forge, comfy, own = tmp_path / "forge", tmp_path / "comfy", tmp_path / "own"
    dream = touch(forge / "models/Stable-diffusion/sub/dream.v2.safetensors")
    touch(forge / "models/Stable-diffusion/sub/dream.v2.vae.safetensors")
    style = touch(forge / "models/Lora/style.safetensors")
    flux = touch(comfy / "models/diffusion_models/flux.gguf")
    t5 = touch(comfy / "models/text_encoders/t5.safetensors")
    other = touch(own / "style.safetensors")
    touch(forge / "models/Lora/style.gguf")  # holds no LoRA
    touch(own / "diffusers/model_index.json")
    touch(own / "diffusers/unet/weights.safetensors")
    touch(own / ".hidden/x.safetensors")
    (own / "loop").symlink_to(own)
    monkeypatch.setenv("TILER_MODEL_DIRS", f"{forge}:{comfy}:{own}:{tmp_path / 'none'}")
    monkeypatch.setenv("TILER_LORA_DIRS", str(own))
    assert find(Kind.MODEL, "dream.v2") == (dream,)
    assert find(Kind.MODEL, "sub/dream.v2") == find(Kind.MODEL, "dream.v2.safetensors") == (dream,)
    assert find(Kind.MODEL, "eam.v2") == ()
    assert files(Kind.MODEL) == [dream, flux, own / "diffusers", other]
    assert files(Kind.MODEL, [own / "diffusers", comfy]) == [own / "diffusers", flux]
    assert model_files([comfy]) == [flux, t5]
    assert find(Kind.LORA, "style") == (other, style)
    assert find(Kind.LORA, "style", [forge]) == (style,)
    assert find(Kind.TEXT_ENCODER, "t5") == (t5,)
    assert settings.folders(Kind.EMBEDDING) == ()


def test_folders_that_are_no_list_are_refused(config: Path) -> None:
    config.write_text("lora_dirs = 3")
    with pytest.raises(UsageError, match="lora_dirs = 3 is not a list"):
        settings.folders(Kind.LORA)


def test_the_file_is_read_once_and_again_where_it_has_changed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = list[str]()
    loads = tomllib.loads
    monkeypatch.setattr("tiler.request.settings.tomllib.loads", lambda text: reads.append(text) or loads(text))
    for text in ("steps = 3", "steps = 30"):
        config.write_text(text)
        assert [settings.read_config() for _ in range(3)] == 3 * [loads(text)]
    assert reads == ["steps = 3", "steps = 30"]
