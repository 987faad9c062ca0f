"""The C++ kernels of `cpu/`, compiled for this processor when they are first used and kept for the next time.

    ~/.cache/tandem/kernels/HASH.so     HASH of sources, compiler, flags and the processor's features

Nothing is fetched and nothing is run but the compiler; a library is put in place by renaming, so two workers that
start at once cannot see half of one.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("cpu")
MAIN = "tandem_cpu.cpp"
FLAGS = ("-O3", "-march=native", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
TIMEOUT = 300.0  # seconds that the compiler gets


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None, with one warning, where they cannot be had: no g++, or one that fails."""
    compiler = shutil.which("g++")
    if compiler is None:
        logger.warning("no g++ found, so PyTorch computes instead of Tandem's CPU kernels: several times slower")
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as exc:  # Runtime: a user without a home
        reason = getattr(exc, "stderr", "") or str(exc)
        logger.warning("Tandem's CPU kernels cannot be built, PyTorch computes instead, slower: %.500s", reason)
        return None


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tandem" / "kernels"


def _built(compiler: str) -> Path:
    """The library's path, after compiling it if it is not there. Raises OSError, SubprocessError."""
    directory = cache_directory()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if directory.stat().st_uid != os.getuid():
        raise OSError(f"{directory} belongs to somebody else, whose code will not be run")
    path = directory / f"{_identity(compiler)}.so"
    if not path.exists():
        with (directory / "lock").open("w") as lock:  # the workers of a cluster start together; one of them compiles
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, path)
    return path


def _compile(compiler: str, path: Path) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent) as workshop:
        made = Path(workshop) / path.name
        command = [compiler, *FLAGS, str(SOURCES / MAIN), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        os.replace(made, path)
    logger.info("CPU kernels compiled in %.1f seconds", time.monotonic() - began)


def _identity(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=TIMEOUT).stdout
    hasher = hashlib.sha256(version)
    for part in (*FLAGS, platform.machine(), _features()):
        hasher.update(f"{part}\0".encode())
    for source in sorted(SOURCES.iterdir()):
        hasher.update(source.read_bytes())
    return hasher.hexdigest()[:32]


def _features() -> str:
    """What this processor can do: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
