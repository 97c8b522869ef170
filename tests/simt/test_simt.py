"""Runs the C++ drivers of tests/simt: the CUDA and CPU kernels on the host, under the sanitizers."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

import pytest

from tests.conftest import emulated_extension
from tests.simt.build import DRIVERS, VARIANTS, build


@functools.cache
def _without_address_randomisation() -> tuple[str, ...]:
    # ThreadSanitizer of GCC 12 gives up on kernels that randomise addresses by more than 28 bits.
    command = (shutil.which("setarch") or "setarch", "-R")
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except OSError:
        allowed = False
    return command if allowed else ()


def _run(driver: str, variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = build(f"{driver}_{variant}")
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    command = [*_without_address_randomisation(), str(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_driver(driver: str, variant: str) -> None:
    result = _run(driver, variant)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert ", 0 failed" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mistake", "report"),
    [
        ("asan", "overrun", "insufficient space"),
        ("asan", "dynamic_overrun", "heap-buffer-overflow"),
        ("tsan", "race", "data race"),
        ("tsan", "shuffle_is_no_barrier", "data race"),
    ],
)
def test_sanitizer_sees(variant: str, mistake: str, report: str) -> None:
    """A build in which a sanitizer sees nothing would pass every driver."""
    result = _run("test_emulator", variant, mistake)
    assert result.returncode != 0
    assert report in result.stderr


def test_emulated_extension() -> None:
    extension = emulated_extension()
    assert extension.cuda_compiled
    assert extension.cuda_archs == "emulated"
    assert extension.cuda_device_count() == 1
