#!/usr/bin/env bash
# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
# Train on several GPUs: tools/dist_train.sh CONFIG GPUS [more arguments of tools/train.py]
# In the environment: NNODES, NODE_RANK, PORT, MASTER_ADDR.

if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [more arguments of tools/train.py]" >&2
    exit 2
fi

CONFIG=$1
GPUS=$2
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
    "$(dirname "$0")/train.py" \
    "$CONFIG" \
    --launcher pytorch \
    "${@:3}"
