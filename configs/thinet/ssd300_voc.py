# SSD300 with VGG-16 on PASCAL VOC: trained on 07+12 trainval, tested on 07 test.
_base_ = 'mmdet::ssd/ssd300_coco.py'

custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)

# ========================Frequently modified parameters======================
data_root = 'data/VOCdevkit/'
num_classes = 20
max_epochs = 24
# An epoch goes through the data so many times
data_repeats = 5
base_lr = 1e-3
train_batch_size_per_gpu = 8

# ===============================Unmodified in most cases====================
dataset_type = 'VOCDataset'
model = dict(
    bbox_head=dict(
        num_classes=num_classes, anchor_generator=dict(basesize_ratio_range=(0.2, 0.9))))
train_dataloader = dict(
    batch_size=train_batch_size_per_gpu,
    dataset=dict(
        _delete_=True,
        type='RepeatDataset',
        times=data_repeats,
        dataset=dict(
            type='ConcatDataset',
            # The two years differ in this key alone
            ignore_keys=['dataset_type'],
            datasets=[
                dict(
                    type=dataset_type,
                    data_root=data_root,
                    ann_file=f'VOC{year}/ImageSets/Main/trainval.txt',
                    data_prefix=dict(sub_data_root=f'VOC{year}/'),
                    filter_cfg=dict(filter_empty_gt=True, min_size=32),
                    pipeline=_base_.train_pipeline) for year in (2007, 2012)
            ])))
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type=dataset_type,
        data_root=data_root,
        ann_file='VOC2007/ImageSets/Main/test.txt',
        data_prefix=dict(sub_data_root='VOC2007/'),
        test_mode=True,
        pipeline=_base_.test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(_delete_=True, type='VOCMetric', metric='mAP', eval_mode='11points')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=base_lr))
train_cfg = dict(max_epochs=max_epochs)
