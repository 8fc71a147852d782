"""Every kernel against fp64 with odd sizes, on each instruction set of this machine; also by the C driver under
sanitisers."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.native.driving import DRIVER, NATIVE, POOL_DRIVER, write
from tests.native.kernel_cases import (
    LIBRARIES,
    Case,
    address,
    attention,
    attentions,
    cases,
    convolution,
    every_set,
    image,
    kinds,
    lanes,
    linear,
    needs_library,
    others,
    products,
    quantised,
    tokens,
    transforms,
    weights,
    weights_of,
    winograd,
)
from tiler.native import library
from tiler.native.instructions import SETS, machine_of
from tiler.native.library import Activation, Kind, Library, Type

pytestmark = needs_library


@every_set
def test_products_are_those_of_fp64(lib: Library) -> None:
    for case in products(lib):
        case.run(lib)
        assert case.error() <= case.tolerance, (case.call.rows, case.call.outputs, case.call.kind, case.error())


@every_set
def test_the_largest_products_do_not_saturate(lib: Library) -> None:
    """Sums of four products have 16 bits on AVX2 without VNNI."""
    most = 32 if lib.isa == "v3" else 64
    for largest in (most, -most):
        for count, case in (
            (64, linear(Kind.INT8, 9, 64, 32, more=False)),
            (64 * 9, convolution(Kind.INT8, 1, (6, 5), 64, 32, 3, 1)),
        ):
            values, weight, factor, sums, scale, zero = case.tensors[:6]
            for tensor, value in ((values, 255), (weight, largest), (factor, 1), (scale, 1), (zero, 0)):
                tensor.fill_(value)
            sums.fill_(largest * count)
            case.call.bias = None
            assert (case.run(lib) == largest * 255 * count).all()


@every_set
def test_quantised_weights_do_not_saturate(lib: Library) -> None:
    """However their values are distributed, and whatever they meet."""
    for inputs, side, power in ((4, 3, 1), (12, 3, 1), (64, 1, 1), (144, 3, 3), (320, 1, 0)):
        case = quantised(16, inputs, side)
        weight, values, scale = case.tensors
        weight[...] = torch.randn(weight.shape).abs() ** power * torch.randn(weight.shape).sign()
        weight[0], weight[1] = 0, weight[1].abs()  # a row of zeros, and one of positive values
        case.run(lib)
        assert (values[0] == 0).all() and scale[0] == 1
        exact = values.double() * scale.double().view(-1, 1, 1, 1)
        error = (exact - weight).flatten(1).norm(dim=1)[1:] / weight.flatten(1).norm(dim=1)[1:]
        assert error.max() < (0.04 if power < 3 else 0.1), (inputs, side, error.max())
        for sign in (1, -1):  # 255 for all inputs whose weight in output 2 is positive, or all others
            step = (
                linear(Kind.INT8, 1, inputs, 16, more=False)
                if side == 1
                else convolution(Kind.INT8, 1, (1, 1), inputs, 16, side, 1)
            )
            a, packed, factor, sums, own_scale, zero = step.tensors[:6]
            packed.copy_(lanes(values if side > 1 else values[:, :, 0, 0], 4).view_as(packed))
            like = (sign * values[2] > 0).to(torch.uint8) * 255
            a.copy_(like.permute(1, 2, 0).reshape(a.shape) if side > 1 else like.view_as(a))
            sums.copy_(values.flatten(1).sum(1))
            factor.fill_(1), own_scale.fill_(1), zero.zero_()
            step.call.bias = None
            want = (values.double() * like.double()).flatten(1).sum(1)
            assert torch.equal(step.run(lib).double().view(-1), want)


@every_set
def test_rows_and_images_are_those_of_fp64(lib: Library) -> None:
    for case in others():
        case.run(lib)
        assert case.error() <= case.tolerance, (type(case.call), case.out.dtype, case.error())
        if case.out.dtype == torch.uint8:  # a step beside it where two roundings meet, and nowhere else
            assert (case.out.double() - case.want).abs().nanmean() < 0.01


@every_set
def test_weights_are_packed_in_the_order_of_products(lib: Library) -> None:
    for case in weights(lib):
        case.run(lib)
        assert case.error() == 0, (case.call.kind, case.call.outputs, case.call.inputs)


@every_set
def test_transformed_convolutions_are_those_of_fp64(lib: Library) -> None:
    for case in transforms(lib):
        case.run(lib)
        assert case.error() <= case.tolerance, (case.call.kind, case.call.outputs, case.error())
    together = winograd(lib, Kind.FP32, 3, (13, 9), 24, 32).run(lib).clone()
    for i in range(3):  # which images go together changes no bit
        case = winograd(lib, Kind.FP32, 3, (13, 9), 24, 32)
        case.call.images, case.call.a = 1, address(case.tensors[0][i])
        case.call.residual = address(case.tensors[3][i])
        assert torch.equal(case.run(lib)[0], together[i])
    case.tensors[0][2, 3, 4, 5] = float("nan")
    assert case.run(lib)[0, 1:4, 2:5].isnan().all()
    before = winograd(lib, Kind.FP32, 2, (9, 30), 300, 40).run(lib)
    assert torch.equal(winograd(lib, Kind.FP32, 2, (9, 30), 300, 40, is_late=True).run(lib), before)


@every_set
def test_attention_is_that_of_fp64(lib: Library) -> None:
    for case in attentions(lib):
        case.run(lib)
        assert case.error() <= case.tolerance, (case.call.kind, case.call.queries, case.call.dims, case.error())


@every_set
def test_attention_errs_no_more_than_torch(lib: Library) -> None:
    for keys, dims in ((77, 40), (640, 72), (300, 128)):
        case = attention(Kind.FP32, 1, 2, 200, keys, dims)
        case.run(lib)
        split = [x.unflatten(-1, (2, dims)).transpose(1, 2) for x in case.tensors[:3]]
        torchs = F.scaled_dot_product_attention(*split).transpose(1, 2)
        assert case.error() <= 1.3 * float((torchs - case.want).norm() / case.want.norm())


@every_set
def test_attention_of_far_scores(lib: Library) -> None:
    """Scores of several hundred: one key has all the weight, and its maximum may come in a later block."""
    for kind in kinds(lib):
        if kind is not Kind.INT8:
            case = attention(kind, 1, 2, 50, 400, 40, spread=12)
            case.run(lib)
            assert case.error() <= (2e-5 if kind is Kind.FP32 else 0.15)
            case.tensors[1].zero_()  # all keys alike: the mean of the values
            case.run(lib)
            mean = case.tensors[2].double().mean(1).view(2, 40)
            assert torch.allclose(
                case.out[0].double(), mean.expand(50, 2, 40), atol=1e-6 if kind is Kind.FP32 else 1e-3
            )


@every_set
def test_sums_are_those_of_the_weights(lib: Library) -> None:
    _, _, packed, want = weights_of(Kind.INT8, 37, 30, 3, 3)
    got = torch.empty(48, dtype=torch.int32)
    lib.sums(library.Sums(address(packed), 3, 9 * 8, address(got)), 2)
    assert torch.equal(got[:37], want) and not got[37:].any()


@every_set
@pytest.mark.parametrize("at", [0, 77])
def test_nan_comes_through(lib: Library, at: int) -> None:
    for kind in kinds(lib):
        if kind is not Kind.INT8:
            for act in Activation:
                case = linear(kind, 11, 70, 96, act=act)
                case.tensors[0].view(-1)[at] = float("nan")
                assert case.run(lib)[at // 70].isnan().all()
    for act in Activation:  # of int8 the scale says it
        case = linear(Kind.INT8, 11, 70, 96, act=act)
        case.tensors[4][3] = float("nan")
        assert case.run(lib)[3].isnan().all() and not case.out[2].isnan().any()
    for norm in (True, False):
        case = tokens(4, 50, Type.UINT8, norm=norm)
        case.tensors[0].view(-1)[at] = float("nan")
        case.run(lib)
        scales = case.tensors[-2]
        assert scales[at // 50].isnan() and scales.isnan().sum() == 1
    for value in (float("nan"), float("inf")):
        for groups in (2, 0):
            case = image(3, (9, 17), (12, 24), Type.UINT8, groups=groups)
            case.tensors[1][1].view(-1)[at] = value
            case.run(lib)
            assert case.tensors[4].isnan().tolist() == [False, True, False]
    case = image(3, (3, 3), (12, 24), Type.UINT8, groups=0, silu=False, padding=0, each_place=True)
    case.tensors[1][1].view(-1)[at] = float("nan")
    case.run(lib)
    assert case.tensors[4].isnan().nonzero().flatten().tolist() == [9 + at // 24]
    case = image(1, (8, 8), (32, 0), Type.FP32)
    case.tensors[0].view(-1)[at] = float("nan")
    assert case.run(lib).isnan().any()


@every_set
@pytest.mark.parametrize("value", [0x7FC00000, 0x7FFFFFFF, 0x7F800001])  # of any payload
def test_nan_comes_through_attention(lib: Library, value: int) -> None:
    nan = torch.tensor([value], dtype=torch.int32)
    for kind in kinds(lib):
        for part in range(3) if kind is not Kind.INT8 else ():
            case = attention(kind, 2, 2, 37, 150, 40)
            case.tensors[part].view(torch.int32)[1, 30, 45] = nan  # the second sample's second head
            out = case.run(lib)
            if part == 0:
                assert out[1, 30, 1].isnan().all()
                out[1, 30, 1] = 0
            elif part == 1:
                assert out[1, :, 1].isnan().all()
            else:
                assert out[1, :, 1, 5].isnan().all()
            out[1, :, 1] = 0 if part else out[1, :, 1]
            assert not out.isnan().any()


@every_set
def test_bytes_do_not_depend_on_the_threads(lib: Library) -> None:
    for case in cases(lib):
        first = case.run(lib, 1).clone()
        for threads in (2, 4):
            case.out.zero_()
            assert torch.equal(case.run(lib, threads), first)


@every_set
def test_bytes_do_not_depend_on_the_batch(lib: Library) -> None:
    whole = convolution(Kind.INT8, 3, (13, 9), 40, 80, 3, 1)
    together = whole.run(lib).clone()
    for i in range(3):
        case = convolution(Kind.INT8, 3, (13, 9), 40, 80, 3, 1)
        case.call.rows //= 3
        case.call.a += i * case.call.image_bytes
        case.call.scale += 4 * i
        case.call.zero += 4 * i
        assert torch.equal(case.run(lib)[0], together[i])
    whole = image(3, (33, 17), (12, 24), Type.UINT8)
    together, scales = whole.run(lib).clone(), whole.tensors[4].clone()
    for i in range(3):
        case = image(3, (33, 17), (12, 24), Type.UINT8)
        case.call.images = 1
        for part in range(2):
            case.call.x[part] = address(case.tensors[part][i])
        assert torch.equal(case.run(lib)[0], together[i])
        assert case.tensors[4][0] == scales[i]


@every_set
def test_attention_does_not_depend_on_what_goes_together(lib: Library) -> None:
    """Samples, heads and queries give the same results alone."""
    for kind in kinds(lib):
        if kind is Kind.INT8:
            continue
        together = attention(kind, 2, 3, 300, 200, 40).run(lib).clone()
        for sample, head, first, count in ((1, 2, 0, 300), (0, 1, 7, 1), (1, 0, 130, 40), (0, 0, 211, 77)):
            case = attention(kind, 2, 3, 300, 200, 40)
            call = case.call
            call.samples, call.heads, call.queries = 1, 1, count
            for name, start in (("q", first), ("k", 0), ("v", 0), ("out", first)):
                step = getattr(call, f"{name}_step")
                at = sample * step[0] + head * step[1] + start * step[2]
                setattr(call, name, getattr(call, name) + 4 * at)
            out = case.run(lib)[sample, first : first + count, head]
            assert torch.equal(out, together[sample, first : first + count, head])


def test_two_python_threads_at_once() -> None:
    mine = [
        [
            linear(Kind.FP32, 193, 260, 160),
            image(2, (33, 17), (12, 24), Type.UINT8),
            attention(Kind.FP32, 1, 3, 300, 200, 40),
        ]
        for _ in range(2)
    ]

    def repeat(some: list[Case]) -> None:
        for _ in range(30):
            for case in some:
                case.run(LIBRARIES[-1], 3)

    workers = [threading.Thread(target=repeat, args=(some,)) for some in mine]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(case.error() <= case.tolerance for some in mine for case in some)


def test_threads_are_started_anew_after_fork() -> None:
    case = linear(Kind.FP32, 193, 260, 160)
    want = case.run(LIBRARIES[-1], 2).clone()
    case.out.zero_()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(case.run(LIBRARIES[-1], 2), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_the_pool_runs_every_task_once_and_without_a_race(tmp_path: Path) -> None:
    files = [str(POOL_DRIVER), str(NATIVE / "pool.c"), "-lpthread", "-o", "pool"]
    words = ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Werror", "-fsanitize=thread", *files]
    built = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "tsan" in built.stderr:
        pytest.skip("ThreadSanitizer is not installed")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run(["./pool"], cwd=tmp_path, capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this ThreadSanitizer does not run on this kernel")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


# --- the driver
# ----------------------------------------------------------------------------------------------------------


GCC = {
    "v3": ["-march=x86-64-v3"],
    "v3-vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "v4": ["-march=x86-64-v4", "-mavx512vnni"],
    "v4-bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "neon": ["-march=armv8-a"],
    "dotprod": ["-march=armv8.2-a+dotprod"],
    "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_sanitisers_find_nothing(tmp_path: Path) -> None:
    """Arrays end at their last value, so that reads and writes beyond it are detected. Of instruction sets that do not
    run here only the warnings are looked for."""
    flags = [
        "-std=gnu11",
        "-O0",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-ffp-contract=off",
        "-fno-math-errno",
    ]
    runs = {lib.isa for lib in LIBRARIES}
    sets = [s for s in SETS if s.machine == machine_of(os.uname().machine)]
    source = {s: [str(NATIVE / "kernels.c"), f"-DSET={s.symbol}", f'-DSET_NAME="{s.name}"', *GCC[s.name]] for s in sets}
    idle = [s for s in sets if s.name not in runs]  # which would take most of the time
    jobs = [["-S", "-o", os.devnull, *source[s]] for s in idle]
    (tmp_path / "others.c").write_text("".join(f"const char kernels_{s.symbol};\n" for s in idle))
    watched = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = {f"{s.symbol}.o": source[s] for s in sets if s.name in runs}
    objects |= {f"{name}.o": [str(NATIVE / name)] for name in ("library.c", "pool.c")}
    objects |= {"driver.o": [str(DRIVER)], "others.o": ["others.c"]}
    jobs += [[*watched, "-c", *words, "-o", name] for name, words in objects.items()]
    running = [subprocess.Popen(["gcc", *flags, *job], cwd=tmp_path) for job in jobs]
    assert [process.wait() for process in running] == [0] * len(jobs)
    subprocess.run(["gcc", *flags, *watched, *objects, "-lpthread", "-lm", "-o", "driver"], cwd=tmp_path, check=True)
    for lib in LIBRARIES:
        made = [*products(lib), *others(), *attentions(lib), *weights(lib), *transforms(lib)]
        names = [f"{lib.isa}-{i}" for i in range(len(made))]
        for case, name in zip(made, names, strict=True):
            write(case, tmp_path / name)
        ran = subprocess.run(
            ["./driver", lib.isa, "2", *names], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
