#!/usr/bin/env bash
# The full YOLOv4 on a GPU: does it compute there what the CPU computes, and the three stages on
# a folder in PASCAL VOC's layout, in mixed precision.
#   benchmarks/gpu_stages.sh path/to/BCCD [more arguments of tools/compress.py]
# Smaller, to see that it runs without a GPU:
#   CONFIG=configs/yolov4/yolov4_n_fast_1xb8-60e_voc-320.py EPOCHS=1 AMP= benchmarks/gpu_stages.sh path/to/BCCD
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${1:?"usage: $0 DATA [arguments of tools/compress.py]"}
shift
CONFIG=${CONFIG:-configs/yolov4/yolov4_fast_1xb64-50e_voc.py}
EPOCHS=${EPOCHS:-24}  # of sparse training and of distilling, each; twice as many before
PYTHON=${PYTHON:-python}
if [[ -n ${AMP-1} ]]; then
    OPTIONS=(--cfg-options optim_wrapper.type=AmpOptimWrapper)
fi

"$PYTHON" benchmarks/device_check.py --config "$CONFIG" --batch-size 4
"$PYTHON" tools/compress.py "$CONFIG" --data "$DATA" --epochs $((2 * EPOCHS)) \
    --sparse-epochs "$EPOCHS" --distill-epochs "$EPOCHS" "${OPTIONS[@]}" "$@"
