#!/usr/bin/env bash
# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
# Train on several GPUs: tools/dist_train.sh CONFIG GPUS [more arguments of tools/train.py]
# In the environment: NNODES, NODE_RANK, PORT, MASTER_ADDR.

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [more arguments of tools/train.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/dist_launch.sh" train.py "$2" "$1" --launcher pytorch "${@:3}"
