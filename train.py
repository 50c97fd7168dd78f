"""Train a model: python train.py --config configs/an4.py [--run DIR] [section.field=value ...]."""

from jaxds2.cli import train

if __name__ == "__main__":
    raise SystemExit(train())
