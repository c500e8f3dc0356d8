# Not trained yet.
# Fine-tuning of the SSD300 with a ResNet-50 that was pruned by LCP; this command writes it:
#   python tools/prune.py configs/ssd/ssd300_r50_1xb32-120k_voc0712.py \
#       work_dirs/ssd300_r50_1xb32-120k_voc0712/iter_120000.pth \
#       --no-compensate --calib-batches 2000
_base_ = './ssd300_r50_1xb32-120k_voc0712.py'

pruned = 'work_dirs/ssd300_r50_1xb32-120k_voc0712-pruned'
load_from = f'{pruned}/pruned.pth'
model = dict(
    type='mmgcp.PrunedDetector', detector=_base_.model.type, channels=f'{pruned}/pruned.py')
param_scheduler = [_base_.param_scheduler[1]]  # without a warm-up
