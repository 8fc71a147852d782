"""Modules that are kept out of memory, modules that are loaded after all when needed, and a library's caller who
compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiler.memory.lean_imports import _UNUSED


def fresh(code: str, **environment: str) -> str:
    """The output of a new process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, **environment},
    ).stdout  # fmt: skip


def test_help_and_import_load_no_torch() -> None:
    code = "import sys, tiler, tiler.cli.main; print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    assert fresh(code).strip() == "[]"


def test_a_library_renders_without_compiler_and_cluster_code_and_its_caller_can_compile(
    tiny: Path, tmp_path: Path
) -> None:
    """Only the program leaves out the parts that torch.compile needs."""
    code = f"""
import sys
from pathlib import Path
import tiler, torch
import tiler.models.unet, tiler.compute.layers
tiler.models.unet.SMALL = tiler.compute.layers.SMALL = 500  # or all of so small a model would be loaded at once
from tiler.models.built import Models
from tiler.models.family import read_family
from tiler.phases import make_plan
from tiler.planning.resolve import fill
from tiler.request import Precision, RenderRequest
from tiler.weights.checkpoint import resolve
family = read_family(resolve({str(tiny)!r}))
make_plan(fill(RenderRequest(prompt="x", size=64, precision=Precision.INT8)), Models(family), 10**9)
tiler.render(RenderRequest(
    prompt="x", output=Path({str(tmp_path / "a.png")!r}), model={str(tiny)!r}, size=64, num_inference_steps=1, guide=False
))
print([m for m in ("torch._dynamo", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp") if m in sys.modules])
print("torch._meta_registrations" in sys.modules)
print(torch.compile(lambda x: torch.nn.functional.silu(x) + 1, backend="eager")(torch.zeros(2)).tolist())
# Everything is as it was for the rest of the program.
import torch._dynamo, diffusers.models.transformers as t
print(hasattr(torch._dynamo, "explain"), hasattr(t, "SD3Transformer2DModel"), torch.distributed.is_available())
"""
    assert fresh(code).splitlines() == ["[]", "True", "[1.0, 1.0]", "True True True"]


def test_a_program_of_ours_leaves_out_more_and_gives_it_to_who_asks(tiny: Path) -> None:
    code = f"""
import sys
from tiler.memory.lean_imports import lean_torch
lean_torch()
from tiler.models.family import Role, read_family
from tiler.models.clip import load_tokenizer
from tiler.weights.checkpoint import resolve
family = read_family(resolve({str(tiny)!r}))
family.part(Role.DENOISER).build(), load_tokenizer(family)
encoder = family.part(Role.TEXT_ENCODER).build()
left_out = "torch._meta_registrations", "torch._decomp", "torch._dynamo", "transformers", "accelerate", "bitsandbytes", "peft", "gguf"
print([m for m in left_out if m in sys.modules])
import torch, torch._meta_registrations as meta, transformers
from diffusers.utils import is_transformers_available
print(hasattr(meta, "register_meta"), transformers.CLIPTextModel is type(encoder), is_transformers_available())
print(torch.Generator().manual_seed(1).initial_seed())
"""
    assert fresh(code).splitlines() == ["[]", "True True True", "1"]


def test_what_was_left_out_comes_when_it_is_wanted_after_all() -> None:
    code = """
from tiler.memory.lean_imports import lean_imports, lean_torch
lean_torch()
with lean_imports():
    from transformers import PreTrainedModel  # a list of all models knows where that is
import torch._dynamo
print(PreTrainedModel.__module__, hasattr(torch._dynamo, "optimize"))
"""
    assert fresh(code).strip() == "transformers.modeling_utils True"


def test_a_program_does_not_load_what_other_programs_have_installed(tmp_path: Path) -> None:
    """Such as SciPy and torchvision, which together would take 78 MB."""
    for name in _UNUSED:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")  # diffusers or transformers would fail to import more of it
        info = tmp_path / f"{name}-99.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n")
    code = f"""
import sys
from tiler.memory.lean_imports import lean_torch
lean_torch()
from tiler.models.family import Role, read_family
from tiler.weights.checkpoint import resolve
family = read_family(resolve("mini"))
family.part(Role.DENOISER).build(), family.part(Role.TEXT_ENCODER).build()
print([m for m in {_UNUSED} if m in sys.modules])
import scipy, torchvision
print(scipy.__file__ == {str(tmp_path / "scipy/__init__.py")!r})
"""
    assert fresh(code, PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}").split() == ["[]", "True"]


def test_modules_of_the_compiler_may_be_imported_meanwhile() -> None:
    """As torchvision does, which transformers imports for a library's caller."""
    code = """
from tiler.memory.lean_imports import lean_imports
with lean_imports():
    from torch._dynamo.utils import is_compile_supported
import sys
print([m for m in sys.modules if m.startswith("torch._dynamo")])
print(bool(is_compile_supported("cpu")), type(is_compile_supported).__name__)
import torch._dynamo.utils
print(hasattr(torch._dynamo.utils, "counters"))
"""
    assert fresh(code).splitlines() == ["[]", "True function", "True"]


def test_lean_imports_within_and_beside_each_other() -> None:
    """And names that others took from a stand-in are real afterwards: transformers keeps a class of torch._dynamo that
    it needs for some masks."""
    code = """
import threading, torch
from tiler.memory.lean_imports import lean_imports
disable, available = torch.compiler.disable, torch.distributed.is_available
inside, leave = threading.Event(), threading.Event()

def other():
    with lean_imports():
        inside.set()
        assert leave.wait(60)

with lean_imports():
    with lean_imports():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    assert torch.compiler.disable is not disable  # the inner one leaves the outer one's work alone
    thread = threading.Thread(target=other)
    thread.start()
    print(inside.wait(0.2))  # two threads take turns
print(inside.wait(60))
leave.set()
thread.join(60)
print(torch.compiler.disable is disable, torch.distributed.is_available is available)
with lean_imports():
    try:
        with lean_imports():
            1 / 0
    except ZeroDivisionError:
        pass
print(torch.compiler.disable is disable)
with lean_imports():
    import transformers.masking_utils as masks
import sys
print("torch._dynamo" in sys.modules)
with masks.TransformGetItemToIndex():
    print(torch.vmap(lambda i: torch.arange(5)[i])(torch.tensor([3, 1])).tolist())
"""
    assert fresh(code).splitlines() == ["False", "True", "True True", "True", "False", "[3, 1]"]


def test_a_process_that_compiles_is_left_alone() -> None:
    code = """
import torch, torch._dynamo
disable = torch.compiler.disable
from tiler.memory.lean_imports import lean_imports
with lean_imports():
    print(torch.compiler.disable is disable, torch.distributed.is_available())
    import diffusers.models.unets, diffusers.utils.torch_utils as utils
print(utils.maybe_allow_in_graph.__module__)
"""
    assert fresh(code).splitlines() == ["True True", "torch._dynamo.decorators"]
