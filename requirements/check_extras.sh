#!/bin/sh
# Prove, by resolving and without downloading, that every extra goes with a current jax on every supported Python.
# Needs uv. Prints the jax that each combination resolves to; fails on the first that does not.
set -eu
cd "$(dirname "$0")/.."
for extra in lm flashlight demo test bench bench-audio cuda12 cuda13; do
    for python in 3.11 3.12 3.13; do
        case "$extra-$python" in cuda*-3.13) continue ;; esac
        jax=$(uv pip compile --quiet --no-header --no-annotate --python-version "$python" --python-platform linux \
            --only-binary :all: --extra "$extra" pyproject.toml | sed -n 's/^jax==//p')
        case "$jax" in 0.1[0-9].*) echo "[$extra] on Python $python: jax $jax" ;; *) echo "[$extra] on Python $python: jax '$jax' is too old" >&2; exit 1 ;; esac
    done
done
