"""`python -m jaxds2` is `jaxds2`."""

from jaxds2.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
