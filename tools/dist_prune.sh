#!/usr/bin/env bash
# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
# Prune on several GPUs: tools/dist_prune.sh CONFIG CHECKPOINT GPUS [more arguments of tools/prune.py]
# In the environment: NNODES, NODE_RANK, PORT, MASTER_ADDR.

if [ $# -lt 3 ]; then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [more arguments of tools/test.py]" >&2
    exit 2
fi

CONFIG=$1
CHECKPOINT=$2
GPUS=$3
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
PORT=${PORT:-29500}
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}

# Also under torch 1.13, this is what torch.distributed.launch runs
PYTHONPATH="$(dirname "$0")/..:$PYTHONPATH" \
python -m torch.distributed.run \
    --nnodes="$NNODES" \
    --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" \
    --nproc_per_node="$GPUS" \
    --master_port="$PORT" \
    "$(dirname "$0")/prune.py" \
    "$CONFIG" \
    "$CHECKPOINT" \
    --launcher pytorch \
    "${@:4}"
