"""The benchmarks run, name every column and leave their numbers as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", [path.stem for path in sorted(BENCHMARKS.glob("bench_*.py"))])
def test_a_benchmark_prints_its_tables_and_writes_its_numbers(name, tmp_path):
    out = tmp_path / "numbers.json"
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--small", "--rounds", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["benchmark"] == name.removeprefix("bench_")
    assert written["versions"]["jax"]
    lines = [line.split() for line in done.stdout.splitlines()]
    for table in written["results"]:
        assert "fused" in table["columns"]
        for column, numbers in table["columns"].items():
            assert any(line[:1] == [column] for line in lines)
            errors = [value for key, value in numbers.items() if key in ("gradient error", "h", "da", "db")]
            assert all(0 <= value < 1e-4 for value in errors), (column, numbers)
            assert errors or numbers["CPU ms"] > 0
