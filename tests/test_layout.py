"""The repository's shape: root folders are the packages, `tandem.*` is their only name, and the wheel has them all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tandem

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "common", "decode_worker", "engine", "kv_transfer", "prefill_worker", "router")
SOURCE = ROOT / "src" / "tandem"


def run_python(code: str) -> str:
    """The output of `code` in a fresh interpreter outside the repository."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=100, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_root_folders_with_code_are_the_packages() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found - {"tests"} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_has_one_relative_link(package: str) -> None:
    link = SOURCE / package
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{package}"


def test_source_folder_holds_links_and_no_code() -> None:
    files = {path.name for path in SOURCE.iterdir() if not path.is_symlink()} - {"__pycache__"}
    assert files == {"__init__.py", "__main__.py", "py.typed"}


def test_packages_import_under_one_name_only() -> None:
    names = run_python(
        "import pkgutil, tandem, sys\n"
        "print([m.name for m in pkgutil.iter_modules(tandem.__path__) if m.ispkg])\n"
        f"import importlib.util\nprint([p for p in {PACKAGES!r} if importlib.util.find_spec(p)])"
    ).splitlines()
    assert names == [repr(sorted(PACKAGES)), "[]"]


def test_handwritten_code_never_imports_a_package_by_its_bare_name() -> None:
    bare = re.compile(rf"^\s*(?:from|import)\s+(?:{'|'.join(PACKAGES)})\b", re.MULTILINE)
    offenders = [
        str(path.relative_to(ROOT))
        for folder in (*PACKAGES, "tests", "scripts", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if bare.search(path.read_text(encoding="utf-8"))
    ]
    assert offenders == []


def test_router_leaves_heavy_libraries_alone() -> None:
    heavy = ("torch", "ray", "transformers", "triton")
    loaded = run_python(f"import sys, tandem.router.app\nprint([name for name in {heavy!r} if name in sys.modules])")
    assert loaded == "[]"


def test_every_module_but_the_kernels_imports_without_triton() -> None:
    """A missing backend is told of when it is asked for, not when its neighbour is imported."""
    code = """
import importlib, pkgutil, sys, tandem
sys.modules["triton"] = None  # importing it fails
kernels = ("tandem.engine.kernels.", "tandem.engine.attention.triton", "tandem.engine.models.fused")
for module in pkgutil.walk_packages(tandem.__path__, "tandem."):
    if not module.name.endswith("__main__") and not module.name.startswith(kernels):
        importlib.import_module(module.name)
print("all")
"""
    assert run_python(code) == "all"


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_are_sorted_and_exist(package: str) -> None:
    module = __import__(f"tandem.{package}", fromlist=["__all__"])
    exported: list[str] = list(getattr(module, "__all__", ()))
    assert exported == sorted(exported)
    assert [name for name in exported if not hasattr(module, name)] == []


def test_version_is_written_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/tandem/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", tandem.__version__)


def test_torch_requirement_keeps_an_installed_cpu_build() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    torch = next(r for r in map(Requirement, project["project"]["dependencies"]) if r.name == "torch")
    assert all(torch.specifier.contains(version) for version in ("2.11.0", "2.13.0", "2.13.0+cpu", "2.11.0+cu130"))
    assert not torch.specifier.contains("2.13.1")


def tracked_files(package: str) -> set[str]:
    """What git would commit of a package, so that build leftovers of this checkout do not count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", package]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    return {line for line in listed.splitlines() if (ROOT / line).is_file()}


def test_wheel_maps_every_package_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=100)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    wanted = {f"tandem/{name}" for package in PACKAGES for name in tracked_files(package)}
    assert wanted | {"tandem/__init__.py", "tandem/__main__.py", "tandem/py.typed"} == names
    assert "tandem/common/proto/tandem.proto" in names
    assert any(name.startswith("tandem/engine/demo_model/") for name in names)
