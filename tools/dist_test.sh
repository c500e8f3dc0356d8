#!/usr/bin/env bash
# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
# Test on several GPUs: tools/dist_test.sh CONFIG CHECKPOINT GPUS [more arguments of tools/test.py]
# In the environment: NNODES, NODE_RANK, PORT, MASTER_ADDR.

if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [more arguments of tools/test.py]" >&2
    exit 2
fi
exec bash "$(dirname "$0")/dist_launch.sh" test.py "$3" "$1" "$2" --launcher pytorch "${@:4}"
