"""Score a run: python eval.py --run runs/an4 --manifest data/an4/test.jsonl [--decoder greedy|beam ...]."""

from jaxds2.cli import evaluate

if __name__ == "__main__":
    raise SystemExit(evaluate())
