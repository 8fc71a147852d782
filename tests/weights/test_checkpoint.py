"""The files that a checkpoint is read from: flavours, shards, the hub's cache, and downloads."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from tiler.errors import ModelError, OfflineError, StorageError, UsageError
from tiler.weights import hub
from tiler.weights.checkpoint import resolve, resolve_part
from tiler.weights.flavours import choose_flavour, find_weights, flavour_of

UNET, TEXT = "diffusion_pytorch_model", "model"
PIPELINE = {
    "_class_name": ["pipeline", "StableDiffusionPipeline"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "requires_safety_checker": True,
    "../evil": ["diffusers", "AutoencoderKL"],
}
STEMS = {"unet": UNET, "vae": UNET, "text_encoder": TEXT}


def weights(path: Path, value: float = 0.0, name: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2,), value)}, path)
    return path


def model(folder: Path, **flavours: Iterable[str]) -> Path:
    """A folder in diffusers layout; each part has weight files of the given flavours."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(PIPELINE))
    for part in ("scheduler", "tokenizer", *STEMS):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "config.json").write_text("{}")
    for part, names in flavours.items():
        for flavour in names:
            weights(folder / part / f"{STEMS[part]}{'.' + flavour if flavour else ''}.safetensors")
    return folder


def index(path: Path, *shards: str) -> None:
    path.write_text(json.dumps({"weight_map": {f"tensor {i}": shard for i, shard in enumerate(shards)}}))


@pytest.mark.parametrize(
    ("name", "flavour"),
    [
        ("model.safetensors", ""),
        ("model.fp16.safetensors", "fp16"),
        ("diffusion_pytorch_model.non_ema.safetensors", "non_ema"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", ""),
        ("diffusion_pytorch_model.bf16-00001-of-00002.safetensors", "bf16"),
        ("model-00001-of-00002.fp16.safetensors", "fp16"),
        ("model.safetensors.index.json", ""),
        ("model.safetensors.index.fp16.json", "fp16"),
        ("model.fp16.safetensors.index.json", "fp16"),
        ("config.json", None),
        ("pytorch_model.bin", None),
        ("taesd_decoder.safetensors", None),
        ("model_fp16.safetensors", None),
    ],
)
def test_a_files_name_tells_its_flavour(name: str, flavour: str | None) -> None:
    assert flavour_of(name) == flavour


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_flavours_are_mixed_as_diffusers_mixes_them(tmp_path: Path, variant: str) -> None:
    from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings

    folder = model(tmp_path, unet=["", "fp16", "bf16", "non_ema"], vae=["", "fp16"], text_encoder=[""])
    files = [str(p.relative_to(folder)) for p in folder.glob("*/*.safetensors")]
    want, _ = variant_compatible_siblings(files, variant=variant)
    checkpoint = resolve(str(folder), variant=variant)
    got = {str(info.path.relative_to(folder)) for part in STEMS for info in checkpoint.weights(part).values()}
    assert got == set(want)
    (note,) = checkpoint.notes
    assert variant in note and "text_encoder (plain)" in note and "unet" not in note
    assert ("vae" in note) == (variant != "fp16")


def test_without_a_variant_half_precision_goes_first_and_nothing_is_said(tmp_path: Path) -> None:
    checkpoint = resolve(str(model(tmp_path, unet=["", "fp16", "non_ema"], vae=[""], text_encoder=["fp16"])))
    assert checkpoint.notes == ()
    got = {part: next(iter(checkpoint.weights(part).values())).path.name for part in STEMS}
    assert got == {
        "unet": f"{UNET}.fp16.safetensors", "vae": f"{UNET}.safetensors", "text_encoder": "model.fp16.safetensors",
    }  # fmt: skip


def test_a_variant_that_no_part_has_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path, unet=["", "non_ema"], vae=["fp16"], text_encoder=[""])
    with pytest.raises(ModelError, match=r"'fp61', only fp16, non_ema, plain"):
        resolve(str(folder), variant="fp61")


def test_a_part_of_another_flavour_alone_says_which(tmp_path: Path) -> None:
    checkpoint = resolve(str(model(tmp_path, unet=["bf16"], vae=[""], text_encoder=[""])))
    with pytest.raises(ModelError, match=r"unet.*--variant bf16"):
        checkpoint.weights("unet")


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    folder = model(tmp_path, vae=[""], text_encoder=[""])
    one, two = (f"{UNET}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2))
    weights(folder / "unet" / one, name="a")
    weights(folder / "unet" / two, name="b")
    index(folder / "unet" / f"{UNET}.safetensors.index.fp16.json", two, one, two)
    assert sorted(resolve(str(folder)).weights("unet")) == ["a", "b"]


@pytest.mark.parametrize(("part", "flavour"), [("unet", ""), ("vae", "fp16"), ("text_encoder", "")])
def test_a_whole_file_is_read_where_the_index_beside_it_is_stale(tmp_path: Path, part: str, flavour: str) -> None:
    folder = model(tmp_path, **{key: [flavour] for key in STEMS})
    dotted = f".{flavour}" if flavour else ""
    index(folder / part / f"{STEMS[part]}.safetensors.index{dotted}.json", "gone-1.safetensors", "gone-2.safetensors")
    checkpoint = resolve(str(folder))
    assert set(checkpoint.weights(part)) == {"x"}
    (note,) = checkpoint.notes
    assert f"{STEMS[part]}{dotted}.safetensors is read" in note


@pytest.mark.parametrize(("part", "whole"), [("unet", False), ("text_encoder", True)])
def test_of_a_whole_file_and_all_its_shards_each_library_takes_its_own(tmp_path: Path, part: str, whole: bool) -> None:
    """diffusers looks for an index first, transformers for a complete file."""
    stem = STEMS[part]
    weights(tmp_path / f"{stem}.safetensors", name="whole")
    weights(tmp_path / f"{stem}-00001-of-00001.safetensors", name="shard")
    index(tmp_path / f"{stem}.safetensors.index.json", f"{stem}-00001-of-00001.safetensors")
    found = find_weights(tmp_path, None)
    assert [file.name for file in found.files] == [
        f"{stem}.safetensors" if whole else f"{stem}-00001-of-00001.safetensors"
    ]
    assert (found.note is not None) == whole


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "../x.safetensors"}}',
        b'{"weight_map": {"a": ".."}}',
    ],
)
def test_an_index_that_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / f"{UNET}.safetensors.index.json").write_bytes(content)
    with pytest.raises(ModelError, match="download it again"):
        find_weights(tmp_path, None)


def test_a_missing_shard_is_named_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    folder = model(tmp_path / "plain")
    index(folder / "unet" / f"{UNET}.safetensors.index.json", "one.safetensors", "two.safetensors")
    weights(folder / "unet" / "one.safetensors")
    with pytest.raises(ModelError, match=r"index\.json: two\.safetensors cannot be found.*copy it there"):
        resolve(str(folder)).weights("unet")
    (snapshots := tmp_path / "models--org--name/snapshots").mkdir(parents=True)
    shutil.move(folder, snapshots / "abc")
    with pytest.raises(ModelError, match=r"two\.safetensors .* hf download org/name --include 'unet/.*--revision abc"):
        resolve(str(tmp_path / "models--org--name")).weights("unet")
    (snapshots / "abc/unet" / f"{UNET}.safetensors.index.json").unlink()
    (snapshots / "abc/unet/one.safetensors").rename(snapshots / f"abc/unet/{UNET}-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="one of several shards"):
        resolve(str(tmp_path / "models--org--name")).weights("unet")


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = model(tmp_path, vae=[""], text_encoder=[""])
    (folder / "unet" / f"{UNET}.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match="a pickle can run code"):
        resolve(str(folder)).weights("unet")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """models--org--name in a cache, with two snapshots; `bbb` is main."""
    base = tmp_path / "models--org--name"
    for commit in ("aaa", "bbb"):
        model(base / "snapshots" / commit, **{key: [""] for key in STEMS})
    (base / "refs").mkdir()
    (base / "refs/main").write_text("bbb")
    (base / "refs/old").write_text("aaa")
    return base


@pytest.mark.parametrize(
    ("inside", "revision", "commit"),
    [
        ("", None, "bbb"),
        ("", "old", "aaa"),
        ("", "aaa", "aaa"),
        ("snapshots", None, "bbb"),
        ("snapshots/aaa", None, "aaa"),
    ],
)
def test_a_folder_of_the_hubs_cache_is_a_model(
    repository: Path, inside: str, revision: str | None, commit: str
) -> None:
    checkpoint = resolve(f"{repository / inside}/", revision=revision)
    assert (checkpoint.name, checkpoint.revision) == ("org/name", commit)
    assert checkpoint.folder.samefile(repository / "snapshots" / commit)
    linked = repository.parent / "linked"
    linked.symlink_to(repository / inside)
    assert resolve(str(linked), revision=revision).folder.samefile(checkpoint.folder)


def test_a_cache_folder_that_leaves_a_choice(repository: Path) -> None:
    with pytest.raises(ModelError, match=r"no revision v2.*aaa, bbb"):
        resolve(str(repository), revision="v2")
    (repository / "refs/main").unlink()
    with pytest.raises(ModelError, match=r"several revisions.*aaa, bbb"):
        resolve(str(repository))
    shutil.rmtree(repository / "snapshots/aaa")
    assert resolve(str(repository)).revision == "bbb"
    shutil.rmtree(repository / "snapshots/bbb")
    with pytest.raises(ModelError, match="no revision"):
        resolve(str(repository))


def test_a_tiny_autoencoder_in_the_hubs_cache(tmp_path: Path) -> None:
    base = tmp_path / "models--org--taesd"
    weights(base / "snapshots/c0ffee" / f"{UNET}.safetensors")
    assert set(resolve_part(str(base)).weights("")) == {"x"}


def test_the_folder_above_a_model_says_where_it_is(tmp_path: Path) -> None:
    model(tmp_path / "some-model")
    with pytest.raises(ModelError, match=r"did you mean .*some-model"):
        resolve(str(tmp_path))


LISTING = [
    "README.md",
    "model_index.json",
    "v1-5-pruned.safetensors",
    "v1-5-pruned-emaonly.ckpt",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "feature_extractor/preprocessor_config.json",
    "safety_checker/config.json",
    "safety_checker/model.safetensors",
    "safety_checker/model.fp16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin",
    "unet/config.json",
    f"unet/{UNET}.safetensors",
    f"unet/{UNET}.non_ema.safetensors",
    f"unet/{UNET}.bin",
    "vae/config.json",
    f"vae/{UNET}.safetensors",
]
HALF = [f"{p}/{STEMS[p]}.fp16.safetensors" for p in STEMS]
SHARDED = [
    *(f for f in LISTING if not f.startswith("unet/diff")),
    *(f"unet/{UNET}-0000{i}-of-00002.safetensors" for i in (1, 2)), f"unet/{UNET}.safetensors.index.json",
]  # fmt: skip


@pytest.mark.parametrize(
    ("listing", "variant", "unet"),
    [
        (LISTING, None, [f"unet/{UNET}.safetensors"]),
        (LISTING + HALF, None, [f"unet/{UNET}.fp16.safetensors"]),
        (LISTING, "non_ema", [f"unet/{UNET}.non_ema.safetensors"]),
        (LISTING, "fp16", [f"unet/{UNET}.safetensors"]),
        (SHARDED, None, sorted(SHARDED[-3:])),
    ],
)
def test_only_what_is_needed_is_downloaded(listing: list[str], variant: str | None, unet: list[str]) -> None:
    files = hub.wanted("org/name", listing, PIPELINE, variant)
    assert sorted(f for f in files if f.startswith("unet/") and f != "unet/config.json") == unet
    assert {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "vae/config.json"} <= set(
        files
    )
    assert "tiler.toml" not in files and "tiler.toml" in hub.wanted("a/b", [*listing, "tiler.toml"], PIPELINE, variant)
    assert not any(f.startswith(("safety", "feature", "v1-5", "README")) or f.endswith(".bin") for f in files)


def test_a_repository_of_pickles_is_refused_before_a_download() -> None:
    with pytest.raises(ModelError, match="pickle"):
        hub.wanted("org/name", [f for f in LISTING if "unet" not in f or "safetensors" not in f], PIPELINE, None)


@pytest.mark.parametrize("listing", [LISTING, LISTING + HALF, SHARDED, HALF + [f for f in LISTING if ".saf" not in f]])
def test_the_advised_command_downloads_a_model_that_can_be_read(listing: list[str]) -> None:
    words = shlex.split(hub.fetch_command("org/name", "main"))
    assert words[:3] == ["hf", "download", "org/name"] and words[-2:] == ["--revision", "main"]
    values: dict[str, list[str]] = {"--include": [], "--exclude": []}
    for option, value in zip(words[3:-2:2], words[4:-2:2], strict=True):
        values[option].append(value)
    got = set(filter_repo_objects(listing, allow_patterns=values["--include"], ignore_patterns=values["--exclude"]))
    assert set(hub.wanted("org/name", listing, PIPELINE, None)) <= got
    assert not any("non_ema" in f or ("/" not in f and f != "model_index.json") or f.endswith(".bin") for f in got)


class Hub:
    """Replaces huggingface_hub: a repository of `files`, reachable or not, and a cache of its own."""

    def __init__(self, base: Path, files: list[str]) -> None:
        self.base, self.files, self.reached = base, files, True
        self.fetched: list[str] = []

    def snapshot_download(
        self,
        repo: str,
        revision: str | None,
        allow_patterns: list[str],
        cache_dir: Path,
        local_files_only: bool = False,
    ) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        folder = self.base / "snapshots/c0ffee"
        if local_files_only or not self.reached:
            if not folder.is_dir():
                raise LocalEntryNotFoundError("nothing here")
            return str(folder)
        for file in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            if not (path := folder / file).exists():
                self.fetched.append(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(PIPELINE) if file == "model_index.json" else "{}")
                if path.suffix == ".safetensors":
                    weights(path)
        return str(folder)

    def list_repo_files(self, repo: str, revision: str) -> list[str]:
        if not self.reached:
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE")
        return self.files


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], Hub]:
    def build(files: list[str]) -> Hub:
        fake = Hub(tmp_path / "models--org--name", files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake.snapshot_download)
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
        return fake

    return build


def test_a_model_is_downloaded_once(online: Callable[[list[str]], Hub]) -> None:
    fake = online(LISTING + HALF)
    first = resolve("org/name")
    assert sorted(f for f in fake.fetched if f.endswith(".safetensors")) == sorted(HALF)
    fake.fetched.clear()
    fake.reached = False
    assert resolve("org/name") == first
    assert first.revision == "c0ffee" and first.notes == ()
    assert fake.fetched == []


def test_what_is_missing_in_the_cache_is_downloaded_or_said(online: Callable[[list[str]], Hub]) -> None:
    fake = online(LISTING)
    folder = resolve("org/name").folder
    (folder / "vae" / f"{UNET}.safetensors").unlink()
    fake.reached = False
    with pytest.raises(OfflineError, match=r"only in part.*hf download org/name --include 'model_index\.json'"):
        resolve("org/name")
    fake.reached = True
    assert set(resolve("org/name").weights("vae")) == {"x"}


def test_an_asked_variant_is_looked_for_on_the_hub_and_parts_without_it_are_said(
    online: Callable[[list[str]], Hub],
) -> None:
    fake = online(LISTING)
    resolve("org/name")
    assert "non_ema" in next(iter(resolve("org/name", variant="non_ema").weights("unet").values())).path.name
    fake.reached = False  # and a cache that is mixed as the repository is does without it
    (note,) = resolve("org/name", variant="non_ema").notes
    assert "vae (plain)" in note


@pytest.mark.parametrize("files", [["README.md"], [f for f in LISTING if not f.startswith("model_index")]])
def test_a_repository_of_another_layout(online: Callable[[list[str]], Hub], files: list[str]) -> None:
    online(files)
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(13, "Permission denied"), StorageError),
        (OSError(28, "No space left on device"), StorageError),
        (ConnectionError("refused"), OfflineError),
        (RuntimeError("of an HTTP library that nobody here knows"), OfflineError),
    ],
)
def test_a_download_that_fails(
    online: Callable[[list[str]], Hub], monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception]
) -> None:
    fake = online(LISTING)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(fake, "list_repo_files", fail)
    with pytest.raises(kind, match="HF_HOME" if kind is StorageError else "hf download"):
        resolve("org/name")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def refused(kind: type[Exception]) -> Exception:
    """The hub's answer, made without the response of an HTTP library that differs from version to version."""
    return kind.__new__(kind, "401 Client Error.\n\nMore lines")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (refused(RepositoryNotFoundError), "org/name: the hub has no such model, or only for others; check its name"),
        (refused(GatedRepoError), "asks for your consent; give it at https://huggingface.co/org/name"),
        (refused(RevisionNotFoundError), "check --revision"),
        (
            caused(LocalEntryNotFoundError("x\ny"), OSError(-2, "Name or service not known")),
            "cannot be reached (Name or service not known); check the name and the network",
        ),
        (caused(LocalEntryNotFoundError("x"), OfflineModeIsEnabled("y")), "cannot be reached (HF_HUB_OFFLINE is set)"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_a_line_with_what_to_do(
    online: Callable[[list[str]], Hub], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    fake = online(LISTING)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(fake, "list_repo_files", fail)
    with pytest.raises((ModelError, OfflineError)) as raised:
        resolve("org/name")
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["org/na me", "org/a--b", "o?g/name"])
def test_a_name_that_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="no hub id"):
        resolve(name)


def test_a_home_that_nobody_knows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="write the whole path"):
        resolve("~nobody-of-this-name/model")


def test_flavours_have_an_order() -> None:
    both = ["model.safetensors", "model.fp16.safetensors", "model.bf16.safetensors"]
    assert choose_flavour(both, None) == "fp16"
    assert choose_flavour(both, "bf16") == "bf16"
    assert choose_flavour(both, "non_ema") == ""
    assert choose_flavour(both[1:], "non_ema") == "fp16"
    assert choose_flavour(both[2:], None) is None
