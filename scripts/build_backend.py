"""The PEP 517 backend: setuptools', which first compiles the kernels (build_kernels.py).

A wheel with a library is one of this machine's kind, without it one of any. TILER_KERNELS=0 builds without, and then
nothing is downloaded for it. A build that fails prints a line and does not fail the install.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import build_kernels
from setuptools import build_meta
from setuptools.build_meta import get_requires_for_build_sdist  # noqa: F401  (a hook)

# Of ziglang's wheels, those for machines that the kernels are written for.
COMPILER = 'ziglang>=0.14,<1; platform_machine in "x86_64 aarch64 arm64" and (sys_platform == "linux" or sys_platform == "darwin")'

Settings = Mapping[str, Any] | None


def _compiler() -> list[str]:
    return [] if os.environ.get("TILER_KERNELS") == "0" else [COMPILER]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    """With the sources of the kernels and what compiles them, which setuptools learns from a file at the top alone."""
    template = Path("MANIFEST.in")
    template.write_text(
        "include scripts/build_backend.py scripts/build_kernels.py\nrecursive-include tiler/native *.c *.h\n"
    )
    try:
        return build_meta.build_sdist(sdist_directory, config_settings)
    finally:
        template.unlink()


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    settings = dict(config_settings or {})
    if build_kernels.try_build() is not None:
        settings["--build-option"] = [*_options(settings), f"--plat-name={_platform()}"]
    return build_meta.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    build_kernels.try_build()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def _options(settings: dict[str, Any]) -> list[str]:
    given = settings.get("--build-option", [])
    return [given] if isinstance(given, str) else list(given)


def _platform() -> str:
    """The wheel's tag: what the library was compiled for."""
    machine = platform.machine().lower()
    if sys.platform == "darwin":
        return f"macosx_13_0_{machine}"
    return f"musllinux_1_2_{machine}" if "musl" in build_kernels.target() else f"manylinux_2_17_{machine}"
