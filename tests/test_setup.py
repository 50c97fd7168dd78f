"""What the lock installed is what the project was built on; every extra resolves with a current jax."""

import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements/cpu.lock").read_text()


def pins() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", LOCK, flags=re.MULTILINE):
        found.setdefault(name, []).append(version)
    return found


def test_make_alone_lists_the_targets():
    # Under `make test` this make is a second level, which would announce its directory.
    done = subprocess.run(["make", "--no-print-directory"], capture_output=True, text=True, check=True, cwd=ROOT)
    targets = [line.split()[0] for line in done.stdout.splitlines()]
    assert targets == ["help", "setup", "demo", "test", "stress", "lint", "bench", "clean"]


@pytest.mark.skipif((platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="torch has no CUDA there")
def test_make_bench_takes_no_torch_with_cuda_unasked():
    def wanted(*variables: str) -> set[str]:
        command = ["make", "--no-print-directory", "--dry-run", "--always-make", "bench", *variables]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return set(re.findall(r"disable-pip-version-check (torch.*); then", done.stdout))

    assert wanted() == {"torch==2.13.0+cpu", "torch==2.9.1+cpu torchaudio==2.9.1+cpu"}
    assert "torch==2.13.0" in wanted("TORCH=torch==2.13.0")


def test_jax_is_not_what_an_old_resolver_would_fall_back_to():
    import jax

    assert tuple(map(int, jax.__version__.split(".")[:3])) >= (0, 10, 2)
    assert jax.__version__ in pins()["jax"]


def test_the_lock_pins_every_package_by_hash_and_names_no_host():
    assert "://" not in LOCK
    assert "--index-url" not in LOCK
    requirements = re.findall(r"^[a-z].*?(?=^[a-z]|\Z)", LOCK, flags=re.MULTILINE | re.DOTALL)
    assert len(requirements) > 50
    assert all("--hash=sha256:" in requirement for requirement in requirements)


@pytest.mark.parametrize("name", ["jax", "flax", "optax", "orbax-checkpoint", "grain", "librosa", "jiwer", "kenlm-ex"])
def test_the_lock_holds_the_packages_that_the_project_names(name):
    assert name in pins()


def test_pyctcdecode_is_in_the_lock_only():
    assert pins()["pyctcdecode"] == ["0.5.0"]
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r'^\s*"?pyctcdecode', project, flags=re.MULTILINE)


@pytest.mark.parametrize("module", ["cli", "config", "text", "audio", "data.manifest", "data.plan"])
def test_light_modules_import_no_heavy_ones(module):
    heavy = "{'grain', 'librosa', 'matplotlib', 'soundfile', 'jiwer', 'kenlm', 'pyctcdecode', 'tensorboardX', 'orbax'}"
    code = f"import sys, jaxds2.{module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def index_answers() -> bool:
    """Whether uv is there and can look up a package."""
    uv = shutil.which("uv")
    if uv is None:
        return False
    probe = [uv, "pip", "compile", "--quiet", "--no-deps", "-"]
    try:
        return subprocess.run(probe, input="numpy\n", text=True, capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def test_every_extra_resolves_with_a_current_jax():
    if not index_answers():
        pytest.skip("requirements/check_extras.sh needs uv on PATH and a package index that answers")
    done = subprocess.run(["sh", ROOT / "requirements/check_extras.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    extras = set(re.findall(r"^\[([\w-]+)\]", done.stdout, flags=re.MULTILINE))
    with (ROOT / "pyproject.toml").open("rb") as f:
        assert extras == set(tomllib.load(f)["project"]["optional-dependencies"])
