#!/usr/bin/env bash
# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
# Run a tool in several processes, for the other dist_*.sh: TOOL GPUS [arguments of the tool]
# In the environment: NNODES, NODE_RANK, PORT, MASTER_ADDR.

# Also under torch 1.13, this is what torch.distributed.launch runs
PYTHONPATH="$(dirname "$0")/..:$PYTHONPATH" \
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-"127.0.0.1"}" \
    --nproc_per_node="$2" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/$1" \
    "${@:3}"
