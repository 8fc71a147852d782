"""The library exists if it was built, says why if it does not, and fits the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import build_kernels
import pytest

from tiler.errors import UsageError
from tiler.native import library
from tiler.native.instructions import SETS, machine_of


def said(code: str, **env: str) -> str:
    """The output of a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ASK = "from tiler.native.library import fault, library; found = library(); print(found.isa if found else fault())"
needs_library = pytest.mark.skipif(library.library() is None, reason=f"the library is {library.fault()}")


def test_it_can_be_turned_off() -> None:
    assert said(ASK, TILER_KERNELS="0") == "turned off by TILER_KERNELS=0"


def test_importing_loads_nothing() -> None:
    code = (
        "import sys, tiler.native.library, tiler.native; print('torch' in sys.modules, 'tiler.compute' in sys.modules)"
    )
    assert said(code) == "False False"


@needs_library
def test_a_lower_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    best = said(ASK)
    here = [s for s in SETS if s.machine == machine_of(os.uname().machine)]
    assert best in [s.name for s in here]
    assert said(ASK, TILER_ISA=here[0].name) == here[0].name
    flags = said("from tiler.compute import cpu; print(*cpu.flags())", TILER_ISA=here[0].name).split()
    assert not set(flags) & set(here[0].above)


def test_an_impossible_instruction_set_is_an_error_of_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILER_ISA", "v9")
    with pytest.raises(UsageError, match="TILER_ISA=v9: unknown here; choose from"):
        library.forced()


def test_a_processor_without_the_forced_set_is_an_error_of_usage(tiler) -> None:
    from tiler.compute import cpu

    lacking = [
        s.name for s in SETS if s.machine == machine_of(os.uname().machine) and not {*cpu.flags()}.issuperset(s.needs)
    ]
    if not lacking:
        pytest.skip("this processor has all of them")
    ran = tiler("doctor", env={"TILER_ISA": lacking[-1]})
    assert ran.code == 2
    assert f"TILER_ISA={lacking[-1]}: this processor does not have it" in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.library() is None:
        pytest.skip("there is no library")
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    library._find.cache_clear()
    assert library.library() is None and "another version" in library.fault()
    assert library.fault_of_file() == library.fault()
    monkeypatch.undo()
    library._find.cache_clear()


def test_a_render_says_that_a_library_is_refused_and_what_to_do(
    in_process, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has built none is not told so each time."""
    asked = "plan", "x", "-m", tiny, "--size", 64
    monkeypatch.setattr(library, "_find", lambda: f"kernels.so is of another version of tiler; {library._INSTALL}")
    noted = in_process(*asked)
    assert noted.code == 0, noted.err
    said = " ".join((noted.out + noted.err).split())
    assert said.count("kernels.so is of another version of tiler; install tiler again") == 1, said
    refused = in_process(*asked, "--precision", "bf16")
    assert refused.code == 2 and "install tiler again" in refused.err and "BF16 instructions" not in refused.err
    assert in_process("doctor", "--json").json["--precision bf16"] == "not without tiler's own library"
    monkeypatch.setattr(library, "_find", lambda: "not built")
    assert "torch computes" not in in_process(*asked).err


def test_a_build_that_fails_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "kernels.so"
    old.write_bytes(b"of another machine")
    monkeypatch.setattr(build_kernels, "library_path", lambda: old)
    monkeypatch.setattr(build_kernels.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TILER_KERNELS", raising=False)
    assert build_kernels.try_build() is None
    error = capsys.readouterr().err
    assert error.startswith("tiler: kernels were not built, torch computes instead: ") and error.count("\n") == 1
    assert not old.exists()


def test_no_compiler_is_asked_for_where_kernels_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import build_backend

    monkeypatch.setenv("TILER_KERNELS", "0")
    assert not any("ziglang" in need for need in build_backend.get_requires_for_build_wheel())
    monkeypatch.delenv("TILER_KERNELS")
    assert any(need.startswith("ziglang") for need in build_backend.get_requires_for_build_editable())
