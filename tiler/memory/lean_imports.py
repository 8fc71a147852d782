"""What torch, diffusers and transformers import and this program never runs, kept out of memory and out of the
start."""

from __future__ import annotations

import gc
import importlib.util
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module, metadata
from importlib.machinery import PathFinder

from tiler.memory import process

_lock = threading.RLock()  # two threads that replace and restore names at once would restore each other's
_depth = 0  # how many lean_imports are open
_program = False  # whether this process is ours, so that nobody else needs what is left out


class _FirstOfAll:
    """A finder of nothing: torch's compiler, should anything want it after all, needs first what `lean_torch` left
    out."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torch._dynamo":
            import_module("torch._meta_registrations")


class _StandIn(types.ModuleType):
    """A module whose every name is a decorator that does nothing, and once the lean imports are over what it stands
    for: other modules keep what they took from here."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def later(*args: object, **kwargs: object) -> object:
            if _depth:
                return _no_op(*args, **kwargs)
            return getattr(import_module(self.__name__), name)(*args, **kwargs)

        return later


def _no_op(fn: object = None, *args: object, **kwargs: object) -> object:
    return (lambda f: f) if fn is None else fn


@contextmanager
def _stand_in(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """`modules` under their names; afterwards importing one gives the real one."""
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if sys.modules.get(name) is module:
                del sys.modules[name]
            if parent in sys.modules and sys.modules[parent].__dict__.get(child) is module:
                delattr(sys.modules[parent], child)


def lean_torch() -> None:
    """Import torch without its operators written in Python: 20 MB and a quarter of a second less. For a program's
    start; a library must not do this. They describe shapes to the compiler, which never runs here."""
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
        if hasattr(torch._C, "_set_generator_metaclass"):  # torch 2.13: one of those modules would
            from torch._opaque_base import OpaqueBaseMeta

            torch._C._set_generator_metaclass(OpaqueBaseMeta)
        torch.Generator()
    except (RuntimeError, ImportError):  # a torch that needs them for more
        import torch._meta_registrations


def freeze_imports() -> None:
    """In a program of ours, once models were planned: give memory back, and let no later collection look through what
    was imported, half a million objects (100 → 15 ms)."""
    process.trim()
    if _program:
        gc.freeze()


@contextmanager
def lean_imports() -> Iterator[None]:
    """Import model classes without the compiler and cluster parts of torch: 84 MB of RSS less.

    diffusers and transformers import torch._dynamo for decorators (72 MB), and torch.distributed.tensor (with sympy)
    for multi-GPU loading, neither of which runs here. Within this context the first is a stand-in, the second reports
    itself unavailable (torch's own switch), and three packages of diffusers give single modules without importing all
    their siblings. Afterwards everything is as it was.

    May be entered within itself. Does nothing in a process that has torch._dynamo: somebody compiles there.
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

    if "torch._dynamo" in sys.modules or "diffusers.models.unets" in sys.modules:
        yield
        return
    dynamo = "torch._dynamo", "torch._dynamo._trace_wrapped_higher_order_op"
    with (
        _replaced(torch.compiler, "disable", _no_op),
        _replaced(torch.distributed, "is_available", lambda: False),
        _stand_in({name: _StandIn(name) for name in dynamo}),
        _lean_transformers() if _program else nullcontext(),
    ):
        import diffusers.models  # noqa: F401

        names = (f"diffusers.models.{name}" for name in ("transformers", "unets", "autoencoders"))
        with _stand_in(_folders(*names)):
            yield


@contextmanager
def _lean_transformers() -> Iterator[None]:
    """transformers without its lists of all models, for which it opens 3,300 files, twice: half a second of a warm
    disk. diffusers, which wants it for LoRA alone, takes it for missing; and bitsandbytes, whose import costs
    memory."""
    folders = _folders("transformers", "transformers.models")
    with _stand_in(folders):
        import diffusers.utils.import_utils as known

        utils, package = import_module("transformers.utils"), sys.modules["transformers"]
        with (
            _replaced(known, "_transformers_available", False),
            _replaced(known, "_bitsandbytes_available", False),
            _replaced(utils, "direct_transformers_import", lambda *args: package),
        ):
            yield


@contextmanager
def _replaced(module: types.ModuleType, name: str, value: object) -> Iterator[None]:
    if not hasattr(module, name):  # of another version
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _Folder(types.ModuleType):
    """A package that finds its modules and runs nothing of its own, unless it is asked for what no module of it is."""

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
    """Of packages, those that are not imported yet, as folders."""
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
