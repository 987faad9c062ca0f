"""Kernels are compiled once, for this processor, by this user; without a compiler PyTorch computes and says so once."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tandem.common.errors import ConfigError
from tandem.engine.attention import create_attention
from tandem.engine.engine import Engine
from tandem.engine.kernels import compile as compiler
from tandem.engine.kernels import native
from tests.engine.model_zoo import build, engine_config, generate, oracle_generate, tokens

GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(GXX is None, reason="no g++ here")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is remembered from before, nor for later; `answer` is all that is compiled."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / compiler.MAIN).write_text('#include "answer.h"\n')
    (sources / "answer.h").write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(compiler, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "tandem" / "kernels"
    forget()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in PATH, empty."""
    made = tmp_path / "bin"
    made.mkdir()
    monkeypatch.setenv("PATH", str(made))
    return made


def install(path: Path, script: str) -> None:
    """As the one g++ there is."""
    (path / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (path / "g++").chmod(0o755)


def counting(path: Path) -> Path:
    """The real compiler, after a line for each compilation in the file returned."""
    log = path.parent / "log"
    log.touch()
    system = os.defpath
    install(path, f'PATH={system}\n[ "$1" = --version ] || echo "$*" >> {log}\nexec {GXX} "$@"')
    return log


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def libraries(cache: Path) -> list[Path]:
    """There is nothing else but the lock: no workshop is left."""
    libraries = list(cache.glob("*.so"))
    assert {*cache.iterdir()} <= {*libraries, cache / "lock"}
    return libraries


def answer() -> int:
    found = compiler.library()
    assert found is not None
    return found.answer()


def forget() -> None:
    """As another process that starts later."""
    compiler.library.cache_clear()
    native.available.cache_clear()


@needs_compiler
def test_it_is_compiled_once_and_found_again(path: Path, own_cache: Path) -> None:
    log = counting(path)
    assert answer() == 42
    assert compiler.library() is compiler.library()
    (made,) = libraries(own_cache)
    before = made.stat()
    forget()
    assert answer() == 42
    assert len(log.read_text().splitlines()) == 1
    assert made.stat() == before


@needs_compiler
def test_another_source_processor_flag_or_compiler_is_another_library(
    path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting(path)
    assert answer() == 42
    header = compiler.SOURCES / "answer.h"
    header.write_text(header.read_text().replace("42", "43"))
    forget()
    assert answer() == 43
    monkeypatch.setattr(compiler, "_features", lambda: "flags: sse2")
    forget()
    assert answer() == 43
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-DANOTHER"))
    forget()
    assert answer() == 43
    monkeypatch.setattr(compiler.platform, "machine", lambda: "aarch64")
    forget()
    assert answer() == 43
    install(path, f'[ "$1" != --version ] || {{ echo 99.0; exit; }}\nPATH={os.defpath} exec {GXX} "$@"')
    forget()
    assert answer() == 43
    assert len(libraries(own_cache)) == 6
    header.write_text(header.read_text().replace("43", "42"))


def test_features_are_those_of_the_processor() -> None:
    line = compiler._features()
    assert line.split(":")[0].strip() in ("flags", "Features")
    assert compiler._features() == line


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "no g++ found"),
        ('[ "$1" = --version ] || { echo "fatal: disk on fire" >&2; exit 1; }', "fatal: disk on fire"),
        ("exit 3", "exit status 3"),
        ('[ "$1" = --version ] || : > "${10}"', "file too short"),
    ],
    ids=["none", "fails", "cannot-even-tell-its-version", "makes-rubbish"],
)
def test_without_a_library_there_is_one_warning_and_pytorch_computes(
    path: Path, tmp_path: Path, script: str | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build("llama", tmp_path / "model")
    if script is not None:
        install(path, script)
    for _ in range(3):
        assert compiler.library() is None
    backend, why = create_attention("auto", CPU)
    assert (backend.name, why) == ("cpu", "the model is on the CPU, without a compiler for the native kernels")
    engine = Engine.load(engine_config(tmp_path / "model"))
    assert engine.attention_backend == "cpu"
    prompt = tokens(9, 1)
    assert generate(engine, [prompt], 5) == [oracle_generate(model, prompt, 5)]
    engine.close()
    (warning,) = warnings(caplog)
    assert reason in warning and "PyTorch computes instead" in warning


@needs_compiler
@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_kernels_that_compute_wrongly_are_not_used(
    error: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one kind alone, too: max() overlooks a NaN that is not its first."""
    monkeypatch.setattr(native, "_error", lambda dtype, rows: error if dtype == torch.float16 else 0.0)
    for _ in range(3):
        assert create_attention("auto", CPU)[0].name == "cpu"
    (warning,) = warnings(caplog)
    assert "compute wrongly on this processor" in warning


def test_who_asks_for_the_kernels_by_name_is_told_that_there_are_none(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'native' cannot run here: .*is g\+\+ installed\?.*supported are auto, cpu"):
        create_attention("native", CPU)


@needs_compiler
def test_a_compiler_that_hangs_is_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "TIMEOUT", 0.2)
    install(path, '[ "$1" = --version ] || exec /bin/sleep 60')
    assert compiler.library() is None
    (warning,) = warnings(caplog)
    assert "timed out" in warning


@needs_compiler
def test_a_failed_compilation_leaves_nothing_and_the_next_process_tries_again(path: Path, own_cache: Path) -> None:
    install(path, '[ "$1" = --version ] || exit 1')
    assert compiler.library() is None
    assert libraries(own_cache) == []
    counting(path)
    forget()
    assert answer() == 42


@needs_compiler
def test_a_cache_of_somebody_else_is_not_used(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert answer() == 42
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    forget()
    assert compiler.library() is None
    (warning,) = warnings(caplog)
    assert f"{own_cache} belongs to somebody else" in warning


@needs_compiler
def test_the_cache_is_for_its_user_alone(own_cache: Path) -> None:
    assert answer() == 42
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.library() is None
    assert len(warnings(caplog)) == 1


def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A container may run under a number that has no entry: Path.home() raised RuntimeError, and the worker ended."""
    monkeypatch.delenv("XDG_CACHE_HOME")

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    assert compiler.library() is None
    assert len(warnings(caplog)) == 1


def test_the_kernels_own_sources_are_all_there() -> None:
    """The wheel must carry them: a library without one of them cannot be built."""
    folder = Path(compiler.__file__).with_name("cpu")
    included = {
        line.split('"')[1]
        for file in folder.iterdir()
        for line in file.read_text().splitlines()
        if '#include "' in line
    }
    assert {compiler.MAIN, *included} == {file.name for file in folder.iterdir()}


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other processors are x86-64")
@pytest.mark.parametrize("processor", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "alderlake", "sapphirerapids"])
def test_other_processors_have_code_without_warnings(processor: str) -> None:
    """Whose instructions this one may not have: none, AVX2, AVX-512, those for bytes, those for bfloat16."""
    source = Path(compiler.__file__).with_name("cpu") / compiler.MAIN
    flags = [flag.replace("native", processor) for flag in compiler.FLAGS]
    command = [str(GXX), *flags, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", str(source)]
    subprocess.run(command, check=True, timeout=compiler.TIMEOUT)


@needs_compiler
def test_a_library_is_code_and_loads(own_cache: Path) -> None:
    assert answer() == 42
    (made,) = libraries(own_cache)
    assert ctypes.CDLL(str(made)).answer() == 42
