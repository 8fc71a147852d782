"""Build modules on the meta device, as shapes without data, and refuse configs that no model can be built from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tiler.errors import ModelError
from tiler.weights.checkpoint import Checkpoint


@contextmanager
def on_meta() -> Iterator[None]:
    """Create modules without data within this context. Their initialisers do nothing: torch's own, for the meta device,
    are written in Python and import sympy (40 MB)."""
    import torch
    from torch.overrides import TorchFunctionMode

    class NoInit(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.arange:  # position ids: small, and needed for real
                return func(*args, **kwargs | {"device": "cpu"})
            if func is torch.randn:
                return torch.empty(*args, **kwargs)
            tensor = args[0] if args else kwargs.get("tensor")
            name = getattr(func, "__name__", "")
            if (
                name.endswith("_")
                and not name.startswith("_")
                and name != "requires_grad_"
                and isinstance(tensor, torch.Tensor)
                and tensor.is_meta
            ):
                return tensor
            return func(*args, **kwargs)

    with torch.device("meta"), NoInit():
        yield


class refusing:
    """Turn a library's error about an impossible config into a ModelError."""

    def __init__(self, part: str, checkpoint: Checkpoint) -> None:
        self.where = f"{checkpoint.folder / part}/config.json"

    def __enter__(self) -> None:
        import diffusers.utils.logging

        diffusers.utils.logging.set_verbosity_error()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if isinstance(value, Exception) and not isinstance(value, ModelError):
            raise ModelError(
                f"{self.where}: no model can be built from it ({str(value).splitlines()[0] if str(value) else kind})"
            ) from value
