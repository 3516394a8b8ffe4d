# Sourced by quickstart.sh and test.sh: a virtual environment with everything pinned, built once.
#   GOSSAMER_VENV  where it goes (default: .venv in the repository)
#   PYTHON         the interpreter to make it with (default: python3, 3.11 or newer)
# usage: prepare_environment EXTRA[,EXTRA]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prepare_environment() {
  local extras=$1 venv=${GOSSAMER_VENV:-$PWD/.venv} python=${PYTHON:-python3} stamp
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Gossamer needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 2
  }
  command -v "${CXX:-c++}" >/dev/null || {
    echo "Gossamer builds a C++ module: install a C++20 compiler (g++ or clang++), or set CXX" >&2
    exit 2
  }
  # A stamp for each set of extras: quickstart.sh and test.sh share one environment.
  local done="$venv/.gossamer-$extras"
  stamp="$PWD $(cat pyproject.toml launch/constraints.txt csrc/*.* | sha256sum)"
  if [ "$(cat "$done" 2>/dev/null)" != "$stamp" ]; then
    echo "Setting up $venv (once; a few minutes)" >&2
    "$python" -m venv "$venv"
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check
      --constraint launch/constraints.txt)
    "${pip[@]}" torch # first and alone: another package's range may pull a newer one
    "${pip[@]}" scikit-build-core nanobind ninja cmake
    "${pip[@]}" --no-build-isolation --editable ".[$extras]"
    echo "$stamp" >"$done"
  fi
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
}
