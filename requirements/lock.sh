#!/bin/sh
# Remake requirements/cpu.lock: every package pinned with its hashes, one file for Python 3.11 to 3.13 by markers.
# Needs uv. pyctcdecode is resolved apart, since it pins numpy < 2 but runs on numpy 2; `make setup` installs the
# lock with --no-deps, so that the pin is never looked at.
set -eu
cd "$(dirname "$0")/.."
compile() { uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url "$@"; }
new=$(mktemp)
trap 'rm -f "$new"' EXIT
compile --quiet --upgrade --extra lm --extra demo --extra test pyproject.toml >"$new"
echo 'pyctcdecode==0.5.0' | compile --quiet --no-deps - >>"$new"
cat "$new" >requirements/cpu.lock
