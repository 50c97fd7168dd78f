"""The floors of docs/architecture.md: imports go down, or along an arrow that is written here."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxds2"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")

FLOORS = (
    (
        "config",
        "text",
        "audio",
        "files",
        "lock",
        "worker",
        "allocator",
        "compiler",
        "lifeline",
        "mosaic",
        "stacks",
        "stop",
        "model.cell",
        "model.stored",
    ),
    (
        "features",
        "augment",
        "ctc",
        "hosts",
        "data.manifest",
        "data.download",
        "data.strings",
        "decoding.hypothesis",
        "evaluation.logprobs",
        "model.scan",
        "ctc_kernel",
        "model.mingru_kernel",
        "model.linear",
        "model.convolution",
        "training.optimizer",
        "evaluation.metrics",
        "evaluation.sclite",
    ),
    ("model.*", "data.*", "decoding.*", "evaluation.significance", "evaluation.breakdown"),
    (
        "training.step",
        "training.checkpoint",
        "training.watchdog",
        "training.monitor",
        "evaluation.comparison",
        "evaluation.page",
    ),
    (
        "training.selection",
        "training.compilation",
        "training.step_report",
        "training.loop",
        "training.dryrun",
        "evaluation.evaluate",
        "evaluation.report",
        "evaluation.tuning",
        "inference.*",
    ),
    ("cli", "demo", "__main__"),
)
"""Which modules stand on which floor; a name of its own goes before `folder.*`."""

ARROWS = {
    ("config", "files"),
    ("model.deepspeech2", "model.mingru"),
    ("ctc", "ctc_kernel"),
    ("model.scan", "model.mingru_kernel"),
    ("data.pipeline", "data.plan"),
    ("data.pipeline", "data.shards"),
    ("data.audit", "data.shards"),
    ("decoding.beam", "decoding.lm"),
    ("decoding.beam", "decoding.settings"),
    ("decoding.native_beam", "decoding.settings"),
    ("decoding.flashlight", "decoding.settings"),
    ("decoding.decoder", "decoding.settings"),
    ("decoding.tuned", "decoding.settings"),
    ("decoding.kenlm_tools", "decoding.lm"),
    ("decoding.perplexity", "decoding.lm"),
    ("decoding.published", "decoding.lm"),
    ("decoding.native_beam", "decoding.beam"),
    ("decoding.native_beam", "decoding.lm"),
    ("decoding.flashlight", "decoding.lm"),
    ("decoding.decoder", "decoding.beam"),
    ("decoding.decoder", "decoding.native_beam"),
    ("decoding.decoder", "decoding.flashlight"),
    ("decoding.decoder", "decoding.greedy"),
    ("decoding.decoder", "decoding.blanks"),
    ("decoding.decoder", "decoding.lm"),
    ("data.placement", "data.pipeline"),
    ("training.loop", "evaluation.evaluate"),
    ("training.loop", "inference.recognizer"),
    ("training.loop", "training.selection"),
    ("training.loop", "training.compilation"),
    ("training.loop", "training.step_report"),
    ("training.step_report", "evaluation.evaluate"),
    ("training.dryrun", "training.selection"),
    ("training.dryrun", "inference.recognizer"),
    ("training.selection", "inference.recognizer"),
    ("inference.recognizer", "training.compilation"),
    ("evaluation.evaluate", "inference.recognizer"),
    ("evaluation.report", "inference.recognizer"),
    ("evaluation.report", "evaluation.evaluate"),
    ("evaluation.tuning", "evaluation.evaluate"),
    ("evaluation.tuning", "inference.recognizer"),
    ("inference.transcribe", "inference.recognizer"),
    ("inference.transcribe", "inference.windows"),
    ("inference.transcribe", "inference.formats"),
    ("inference.transcribe", "inference.transcript"),
    ("inference.transcribe", "inference.recordings"),
    ("inference.windows", "inference.recognizer"),
    ("inference.formats", "inference.transcript"),
    ("inference.align", "inference.recognizer"),
    ("cli", "demo"),
    ("__main__", "cli"),
}
"""(importer, imported) inside one floor."""


def floor(module: str) -> int | None:
    """The floor of a module of jaxds2; None: it stands on none."""
    for names in (module, module.rpartition(".")[0] + ".*"):
        for number, rooms in enumerate(FLOORS):
            if names in rooms:
                return number
    return None


def modules(package: Path) -> dict[str, Path]:
    """Modules by their dotted name below the package; a folder's `__init__` goes by the folder's name."""
    found = {".".join(p.relative_to(package).with_suffix("").parts): p for p in sorted(package.rglob("*.py"))}
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of jaxds2 that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the whole name"
            # `from jaxds2.data import plan` brings the module data.plan as does `from jaxds2.data.plan import X`.
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [s if s.removeprefix("jaxds2.") in known else f"{node.module}" for s in submodules]
        else:
            continue
        yield from (name.removeprefix("jaxds2.") for name in names if name.startswith("jaxds2."))


def violations(package: Path) -> list[str]:
    """Imports that go up or sideways, and modules that stand on no floor."""
    known = modules(package)
    found = []
    for name, path in known.items():
        imported = sorted(set(imports(path, known)))
        here = floor(name)
        if path.name == "__init__.py":
            found += [f"{name}: a package's __init__ imports {other}" for other in imported]
            continue
        if here is None:
            found.append(f"{name}: stands on no floor; give it one in tests/test_layering.py")
            continue
        for other in imported:
            there = floor(other)
            if (there is None or there >= here) and (name, other) not in ARROWS:
                found.append(f"{name} (floor {here}) imports {other} (floor {there})")
    return found


def test_imports_go_down_or_along_an_arrow():
    assert violations(PACKAGE) == []


def test_every_arrow_stays_on_its_floor_and_closes_no_cycle():
    below: dict[str, set[str]] = {}
    for importer, imported in ARROWS:
        assert floor(importer) == floor(imported), f"{importer} -> {imported} needs no arrow"
        below.setdefault(importer, set()).add(imported)

    def reach(module: str) -> set[str]:
        return {module}.union(*(reach(m) for m in below.get(module, ())))

    for importer, imported in ARROWS:
        assert importer not in reach(imported), f"{importer} -> {imported} closes a cycle"


def test_the_page_has_the_same_floors():
    rows = re.findall(r"^\| (\d) \| (.+) \|$", PAGE, re.MULTILINE)
    floors = {int(number): sorted(cell.replace("`", "").split(", ")) for number, cell in rows}
    assert len(rows) == len(floors)
    scripts = ["train.py", "eval.py"]  # beside the package
    assert all((ROOT / script).exists() for script in scripts)
    expected = {number: sorted(rooms) for number, rooms in enumerate(FLOORS)}
    expected[len(FLOORS) - 1] = sorted([*FLOORS[-1], *scripts])
    assert floors == expected


def test_the_page_has_the_same_arrows():
    by_last_name: dict[str, list[str]] = {}
    for module in modules(PACKAGE):
        by_last_name.setdefault(module.rpartition(".")[2], []).append(module)
    arrows = []
    for chain in re.findall(r"`(\w+(?: -> \w+)+)`", PAGE):
        for importer, imported in itertools.pairwise(chain.split(" -> ")):
            arrows += itertools.product(by_last_name[importer], by_last_name[imported])
    assert sorted(arrows) == sorted(ARROWS)


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("config.py", "from jaxds2.features import num_frames\n", "config (floor 0) imports features (floor 1)"),
        ("text.py", "def f():\n    import jaxds2.cli\n", "text (floor 0) imports cli (floor 5)"),
        ("data/plan.py", "from jaxds2.data import pipeline\n", "data.plan (floor 2) imports data.pipeline (floor 2)"),
        ("data/__init__.py", "from jaxds2.config import Config\n", "data: a package's __init__ imports config"),
        ("utils.py", "", "utils: stands on no floor; give it one in tests/test_layering.py"),
    ],
)
def test_a_broken_floor_is_named(tmp_path: Path, name: str, source: str, complaint: str):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/pipeline.py").touch()
    (tmp_path / name).write_text(source)
    assert violations(tmp_path) == [complaint]
