"""Deep Speech 2 with parallel minGRU, in pure JAX and Flax."""

__version__ = "0.1.0"
