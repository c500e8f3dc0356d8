#!/usr/bin/env bash
# On a GPU: does it compute there what the CPU computes, the three stages of the whole YOLOv4 on a
# folder in PASCAL VOC's layout, in mixed precision, and how long an image takes before and after.
#   benchmarks/gpu_stages.sh path/to/BCCD [more arguments of tools/compress.py]
# Smaller, to see that it runs without a GPU:
#   CONFIG=configs/yolov4/yolov4_n_fast_1xb8-60e_voc-320.py EPOCHS=1 AMP= benchmarks/gpu_stages.sh path/to/BCCD
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?"usage: $0 DATA [arguments of tools/compress.py]"}
shift
CONFIG=${CONFIG:-configs/yolov4/yolov4_fast_1xb8-60e_voc-320.py}
EPOCHS=${EPOCHS:-20}  # of sparse training and of distilling, each; twice as many before
PYTHON=${PYTHON:-python}
OPTIONS=()
if [[ -n ${AMP-1} ]]; then
    OPTIONS=(--cfg-options optim_wrapper.type=AmpOptimWrapper)
fi

# The small YOLOv4, as its twin on the CPU computes in double precision
"$PYTHON" benchmarks/device_check.py --size "${CHECK_SIZE:-160}"
FOLDER=work_dirs/$(basename "$CONFIG" .py)-compressed
"$PYTHON" tools/compress.py "$CONFIG" --work-dir "$FOLDER" --data "$DATA" --epochs $((2 * EPOCHS)) \
    --sparse-epochs "$EPOCHS" --distill-epochs "$EPOCHS" "${OPTIONS[@]}" "$@"
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$PYTHON" benchmarks/gpu_latency.py --size 320 "$FOLDER/baseline.py" \
        "$(cat "$FOLDER/baseline/last_checkpoint")" "$FOLDER"/pruned/pruned.{py,pth}
fi
