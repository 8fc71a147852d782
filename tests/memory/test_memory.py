"""The ceiling: units, the budget's own measurements, the meter, the plan, and what imports cost."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tiler.compute.shapes import MetaMeter
from tiler.errors import BudgetExceeded, BudgetRefused, UsageError
from tiler.memory.budget import Budget, parse_bytes
from tiler.memory.process import _untouched_code, read_rss, trim
from tiler.models.family import read_family
from tiler.plan.render import plan_render
from tiler.plan.table import MemoryPlan, PhasePlan, Term
from tiler.request import RenderRequest
from tiler.weights.checkpoint import resolve


@pytest.mark.parametrize(
    ("text", "want"),
    [("800MB", 800_000_000), ("1.5 GiB", 3 * 2**29), ("760mib", 760 * 2**20), (123, 123), ("2g", 2 * 10**9)],
)
def test_amounts(text: str | int, want: int) -> None:
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "800XB", "1e9", "nan"])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(UsageError, match="800MB"):
        parse_bytes(text)


def test_budget_measures_a_spike_between_two_samples() -> None:
    trim()  # a phase begins with that
    with Budget("10GB") as budget:
        before = budget.peak_rss_bytes
        with budget.phase("spike") as use:
            block = torch.ones(50_000_000)  # 200 MB, gone at once
            del block
    assert 190e6 < budget.peak_rss_bytes - before < 260e6
    assert use.peak_rss_bytes == budget.peak_rss_bytes
    assert abs(use.anon_bytes + use.file_bytes - use.peak_rss_bytes) <= 0.5 * use.peak_rss_bytes


def test_budget_raises_at_the_ceiling_with_the_place() -> None:
    with Budget(read_rss().now + 60_000_000) as budget:
        budget.check("before")
        block = torch.ones(40_000_000)
        with pytest.raises(BudgetExceeded, match=r"unet\.up_blocks\.1") as caught:
            budget.check("unet.up_blocks.1")
        del block
    assert caught.value.exit_code == 5


def test_budget_counts_children() -> None:
    with Budget("10GB") as budget:
        before = budget.rss_bytes
        child = subprocess.Popen(
            [sys.executable, "-c", "x = bytearray(b'1') * 80_000_000; print(1, flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        seen = before
        while seen - before < 60_000_000:  # the sampler's next look
            seen = budget.rss_bytes
        child.communicate(b"\n")
    assert budget.peak_rss_bytes - before > 60_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
@pytest.mark.parametrize(("planned", "stays"), [("100MB", True), ("1900MB", False)])
def test_freed_memory_stays_only_under_a_roomy_ceiling(planned: str, stays: bool) -> None:
    """A layer's 40 MB are faulted in anew at every call unless the ceiling is far above the plan."""
    code = f"""
import resource
from tiler import Budget
from tiler.memory import process
from tiler.memory.budget import at_layer, parse_bytes
process.frugal_allocator()
check = at_layer(Budget("2GB"), parse_bytes({planned!r}))
faults = []
for _ in range(6):
    block = bytearray(40 * 2**20)
    for i in range(0, len(block), 4096):
        block[i] = 1
    del block
    check("layer")
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((faults[-1] - faults[0]) * resource.getpagesize(), process.read_rss().now)
"""
    faulted, now = map(int, fresh(code).split())
    assert (faulted < 10 * 2**20) == stays
    assert (now > 40 * 2**20) == stays


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_mapped_blocks_leave_no_holes_between_others() -> None:
    """Every second of 64 blocks is freed, as when a weight is copied on its way to another layout."""
    code = """
from contextlib import nullcontext
from tiler.memory import process
process.frugal_allocator()
for context in (nullcontext, process.mapped_blocks):
    before = process.read_rss().now
    with context():
        blocks = [bytearray(b"x") * (2 * 2**20) for _ in range(64)]
    del blocks[::2]
    print(process.read_rss().now - before)
    del blocks
"""
    heap, mapped = map(int, fresh(code).split())
    assert heap > 120 * 2**20
    assert mapped < 72 * 2**20


def test_memory_is_short_when_what_comes_would_not_fit() -> None:
    budget = Budget("10GB")
    assert not budget.short(1_000_000_000)
    assert budget.short(9_700_000_000)


def test_meter_counts_what_is_alive() -> None:
    with MetaMeter() as meter, torch.device("meta"), torch.no_grad():
        x = torch.empty(1000)
        y = x + 1
        del x
        z = torch.cat([y, y])
        view = z[10:]
        del y, z
        assert meter.live_bytes == 8000
        del view
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 4000 + 8000


def test_meter_knows_a_convolutions_scratch_and_not_its_weights() -> None:
    with torch.device("meta"):
        conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    with MetaMeter() as meter, torch.no_grad():
        out = conv(torch.empty(1, 4, 16, 16, device="meta"))
    x_bytes, out_bytes = 4 * 256 * 4, 8 * 256 * 4
    assert out.shape == (1, 8, 16, 16)
    assert meter.peak_bytes == x_bytes + out_bytes + (x_bytes + out_bytes + conv.weight.nbytes)


def test_plan_refuses_with_the_table_and_the_smallest_ceiling() -> None:
    phase = PhasePlan(
        name="canvas", terms=(Term(name="weights", nbytes=500_000_000), Term(name="activations", nbytes=400_000_000))
    )
    plan = MemoryPlan(max_bytes=800_000_000, phases=(phase,), smallest_bytes=700_000_001)
    with pytest.raises(BudgetRefused, match="701MB") as caught:
        plan.check()
    assert "weights" in str(caught.value)
    assert caught.value.exit_code == 4


def test_more_memory_means_larger_batches_and_resident_weights(tiny: Path) -> None:
    family = read_family(resolve(str(tiny)))
    request = RenderRequest(prompt="x", output=Path("x.png"), width=512, height=512, num_inference_steps=4)
    here = read_rss().now
    plans = [plan_render(request, family, here + extra) for extra in (56_000_000, 80_000_000, 2_000_000_000)]
    assert plans[0].batch <= plans[1].batch <= plans[2].batch
    assert plans[2].batch > 1
    kept = [plan.resident["canvas"] for plan in plans]
    assert len(kept[0]) <= len(kept[2])
    assert set(kept[2].values()) == {torch.float32}
    assert all(p.memory.smallest_bytes == pytest.approx(plans[0].memory.smallest_bytes, rel=0.05) for p in plans)


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_help_and_import_load_no_torch() -> None:
    code = "import sys, tiler, tiler.cli.main; print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    assert fresh(code).strip() == "[]"


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_models_are_built_and_planned_without_compiler_and_cluster_code(tiny: Path, precision: str) -> None:
    code = f"""
import sys
from pathlib import Path
import tiler.models.unet, tiler.compute.layers
tiler.models.unet.SMALL = tiler.compute.layers.SMALL = 500  # or all of so small a model would be loaded at once
from tiler.models.family import Role, read_family
from tiler.plan.render import plan_render
from tiler.request import Precision, RenderRequest
from tiler.weights.checkpoint import resolve
family = read_family(resolve({str(tiny)!r}))
request = RenderRequest(prompt="x", output=Path("x.png"), width=256, height=256, precision=Precision({precision!r}))
plan_render(request, family, 10**9)
family.part(Role.TEXT_ENCODER).build()
print([m for m in ("torch._dynamo", "sympy", "torch.distributed.tensor", "torch.distributed.fsdp") if m in sys.modules])
import torch._dynamo, diffusers.models.transformers as t
print(hasattr(torch._dynamo, "optimize"), hasattr(t, "SD3Transformer2DModel"), torch.distributed.is_available())
"""
    first, second = fresh(code).strip().splitlines()
    assert first == "[]"
    assert second == "True True True"  # and everything is as it was for the rest of the program


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
print([m for m in ("torch._meta_registrations", "torch._decomp", "torch._dynamo", "transformers") if m in sys.modules])
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


def test_code_that_ran_leaves_memory_and_returns() -> None:
    code = """
from tiler.memory import process
import torch
x = torch.arange(64.).view(8, 8)
before, product = process.read_rss(), x @ x
process.release_code()
after = process.read_rss()
print(before.file > 2 * after.file, torch.equal(x @ x, product), after.anon >= before.anon - 2**20)
"""
    assert fresh(code).strip() == "True True True"


def test_only_code_that_can_be_had_from_its_file_is_released() -> None:
    def mapping(span: str, rights: str, path: str, anonymous: int) -> str:
        return f"{span} {rights} 00000000 08:01 123 {path}\nSize: 4 kB\nAnonymous:           {anonymous} kB\nVmFlags: rd ex mr\n"

    smaps = (
        mapping("1000-3000", "r-xp", "/usr/lib/a.so", 0)
        + mapping("4000-5000", "r-xp", "/usr/lib/patched.so", 4)
        + mapping("6000-7000", "rw-p", "/usr/lib/a.so", 0)
        + mapping("8000-9000", "r-xp", "", 0)
        + mapping("a000-b000", "r-xp", "[vdso]", 0)
        + mapping("c000-f000", "r-xp", "/usr/lib/b c.so", 0)
    )
    assert list(_untouched_code(smaps)) == [(0x1000, 0x3000), (0xC000, 0xF000)]


def test_a_plan_knows_what_building_the_model_imports(tiny: Path) -> None:
    """Planning is the first thing that a process does with a model: diffusers is imported on the way."""
    code = f"""
from pathlib import Path
from tiler.memory.process import _untouched_code, read_rss, trim
from tiler.models.family import Role, read_family
from tiler.plan.render import plan_decode
from tiler.request import Decode, ScratchDtype, Wrap
from tiler.weights.checkpoint import resolve
kind, options = read_family(resolve({str(tiny)!r})).autoencoder, dict(scratch_dtype=ScratchDtype.FP16, wrap=Wrap.NONE)
_, plan, _ = plan_decode(kind, (64, 64), 10**9, decode=Decode.FROZEN, scratch=Path("."), **options)
print(plan.phases[0].terms[0].nbytes, read_rss().now)
"""
    libraries, now = map(int, fresh(code).split())
    assert libraries > now
