"""Keep modules that torch, diffusers and transformers import, and this program never runs, out of memory and out of the
start-up time."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module, metadata
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder

from tiler.memory import process

# What diffusers and transformers import for other devices, quantised weights and other models, where it is installed.
_UNUSED = (
    "flash_attn", "flash_attn_3", "flash_attn_interface", "hqq", "librosa", "sageattention", "scipy", "soundfile",
    "torch_npu", "torch_xla", "torchao", "torchaudio", "torchvision", "xformers",
)  # fmt: skip
_lock = threading.RLock()  # two threads that replace and restore names at the same time would restore each other's
_depth = 0  # nested lean_imports that are active
_program = False  # whether this process runs our program, so that no other code needs the missing parts


class _FirstOfAll:
    """A module finder that finds nothing. If something imports torch's compiler after all, it first imports the modules
    that `lean_torch` left out, which the compiler needs."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torch._dynamo":
            import_module("torch._meta_registrations")


class _StandIn(types.ModuleType):
    """A module in which every name is a decorator that does nothing. Once the lean imports are over, these names
    forward to the real module, because other modules may have kept references to them."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = list[str]()  # it may be a package: _Inner finds its modules

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def later(*args: object, **kwargs: object) -> object:
            if _depth:
                return _no_op(*args, **kwargs)
            return getattr(import_module(self.__name__), name)(*args, **kwargs)

        return later


class _Inner(Loader):
    """A finder of the modules inside stand-ins, which are stand-ins too: torchvision imports torch._dynamo.utils."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        inside = isinstance(sys.modules.get(name.rpartition(".")[0]), _StandIn)
        return ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _no_op(fn: object = None, *args: object, **kwargs: object) -> object:
    return (lambda f: f) if fn is None else fn


@contextmanager
def _stand_in(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Put `modules` into sys.modules under their names; afterwards, importing such a name loads the real module."""
    sys.modules.update(modules)
    inner = _Inner()
    sys.meta_path.insert(0, inner)
    try:
        yield
    finally:
        sys.meta_path.remove(inner)
        inside = {
            name: module
            for name, module in sys.modules.items()
            if isinstance(module, _StandIn) and name.startswith(tuple(f"{outer}." for outer in modules))
        }
        for name, module in (modules | inside).items():
            parent, _, child = name.rpartition(".")
            if sys.modules.get(name) is module:
                del sys.modules[name]
            if parent in sys.modules and sys.modules[parent].__dict__.get(child) is module:
                delattr(sys.modules[parent], child)


def lean_torch() -> None:
    """Import torch without its operators written in Python, which saves 20 MB and a quarter of a second. These
    operators describe shapes to the compiler, which never runs here. Call it only when a program starts; a library must
    not do this."""
    global _program, _depth
    _program = True
    if "torch" in sys.modules:
        return
    _depth += 1
    with _stand_in({"torch._meta_registrations": _StandIn("torch._meta_registrations")}):
        import torch
    _depth -= 1
    sys.meta_path.insert(0, _FirstOfAll())
    try:
        if hasattr(torch._C, "_set_generator_metaclass"):  # torch 2.13: one of the skipped modules would do this
            from torch._opaque_base import OpaqueBaseMeta

            torch._C._set_generator_metaclass(OpaqueBaseMeta)
        torch.Generator()
    except (RuntimeError, ImportError):  # another version of torch, which needs these modules
        import torch._meta_registrations


def start_program() -> None:
    """`lean_torch`, for a process that plans one run. No garbage is collected until `freeze_imports`: among half a
    million imported objects it takes half a second in all, and finds 1 MB."""
    gc.disable()
    lean_torch()


def freeze_imports() -> None:
    """Give memory back, and, in a program of ours, exclude the half a million imported objects from later garbage
    collections (100 → 15 ms each). Call it after planning."""
    process.trim()
    if _program:
        gc.freeze()
        gc.enable()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import model classes without torch's compiler and distributed code, which saves 84 MB of RSS.

    diffusers and transformers import torch._dynamo for decorators (72 MB), and torch.distributed.tensor (with sympy)
    for multi-GPU loading; neither runs here. Within this context torch._dynamo is a stand-in, torch.distributed reports
    itself unavailable (torch's own switch), operators that diffusers registers do not name their line, for which torch
    would look through all modules (0.2 s), and three packages of diffusers load single modules without importing their
    siblings. Everything is restored on exit.

    Contexts may be nested. Does nothing in a process that has already imported torch._dynamo, because that process may
    compile.
    """
    global _depth
    with _lock:
        _depth += 1
        try:
            with _replacements() if _depth == 1 else nullcontext():
                yield
        finally:
            _depth -= 1


@contextmanager
def _replacements() -> Iterator[None]:
    import torch.compiler
    import torch.distributed

    operators = sys.modules.get("torch._library.utils", types.ModuleType(""))  # in other versions elsewhere
    if "torch._dynamo" in sys.modules or "diffusers.models.unets" in sys.modules:
        yield
        return
    with (
        _replaced(torch.compiler, "disable", _no_op),
        _replaced(torch.distributed, "is_available", lambda: False),
        _replaced(operators, "get_source", lambda level: "unknown"),
        _stand_in({"torch._dynamo": _StandIn("torch._dynamo")}),
        _lean_transformers() if _program else nullcontext(),
    ):
        import diffusers.models  # noqa: F401

        names = (f"diffusers.models.{name}" for name in ("transformers", "unets", "autoencoders"))
        with _stand_in(_folders(*names)):
            yield


@contextmanager
def _lean_transformers() -> Iterator[None]:
    """Import transformers without its lists of all models: to build these it opens 3,300 files, twice, which takes half
    a second on a warm disk. diffusers is told that transformers is missing, since it would use it for LoRA alone. Both
    are told that accelerate, bitsandbytes and PEFT are missing, and diffusers that gguf is, since importing them costs
    21 MB. Nobody finds the packages in _UNUSED, of which SciPy and torchvision would cost 78 MB. diffusers gets no
    table of all installed packages, which takes a quarter of a second: it would need it for names like cv2 alone."""
    folders = _folders("transformers", "transformers.models")
    with _stand_in(folders), _missing(*_UNUSED):
        with _replaced(metadata, "packages_distributions", dict):
            import diffusers.utils.import_utils as known

        utils, package = import_module("transformers.utils"), sys.modules["transformers"]
        with ExitStack() as stack:
            for name in ("transformers", "accelerate", "bitsandbytes", "gguf", "peft"):
                stack.enter_context(_replaced(known, f"_{name}_available", False))
            for name in ("accelerate", "peft"):
                stack.enter_context(_replaced(utils, f"is_{name}_available", lambda *args: False))
            stack.enter_context(_replaced(utils, "direct_transformers_import", lambda *args: package))
            yield


@contextmanager
def _missing(*packages: str) -> Iterator[None]:
    """Let nothing find these packages, unless they are imported already."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python's own way to say so
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name, name) is None:
                del sys.modules[name]


@contextmanager
def _replaced(module: types.ModuleType, name: str, value: object) -> Iterator[None]:
    if not hasattr(module, name):  # another version of the library
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _Folder(types.ModuleType):
    """A package that finds its modules but does not run its own `__init__`, unless it is asked for a name that is not
    one of its modules."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return import_module(f"{self.__name__}.{name}")
        except ModuleNotFoundError:
            if sys.modules.get(self.__name__) is self:
                del sys.modules[self.__name__]
            return getattr(import_module(self.__name__), name)


def _folders(*packages: str) -> dict[str, types.ModuleType]:
    """Return a `_Folder` for each of `packages` that is not imported yet."""
    found: dict[str, types.ModuleType] = {}
    for name in packages:
        if name in sys.modules:
            continue
        parent = name.rpartition(".")[0]
        path = list((found.get(parent) or sys.modules[parent]).__path__) if parent else []
        spec = PathFinder.find_spec(name, path) if parent else importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        found[name] = folder = _Folder(name)
        folder.__spec__, folder.__file__ = spec, spec.origin
        folder.__path__ = list(spec.submodule_search_locations or [])
        if not parent:
            folder.__dict__["__version__"] = metadata.version(name)
    return found
