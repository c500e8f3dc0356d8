# The small YOLOv4 on the rendered shapes of tools/dataset_converters/make_demo_dataset.py.
_base_ = './yolov4_n_fast_1xb8-60e_voc-320.py'

# ========================Frequently modified parameters======================
data_root = 'work_dirs/demo-data/'
classes = ('cross', 'disc', 'ring', 'square', 'star', 'triangle')
max_epochs = 40
img_scale = (192, 192)  # width, height
base_lr = 0.01
train_batch_size_per_gpu = 8

# ========================Possible modified parameters========================
affine_scale = 0.2
# In pixels at the input scale, from the sizes of the rendered shapes
anchors = [
    [(13, 13), (17, 17), (23, 23)],  # P3/8
    [(29, 29), (36, 36), (45, 45)],  # P4/16
    [(55, 55), (66, 66), (85, 85)]  # P5/32
]

# ===============================Unmodified in most cases====================
num_classes = len(classes)
metainfo = dict(classes=classes)
model = dict(
    bbox_head=dict(
        head_module=dict(num_classes=num_classes),
        prior_generator=dict(base_sizes=anchors),
        loss_cls=dict(loss_weight=0.1),
        loss_obj=dict(loss_weight=0.15)))

train_pipeline = [
    *_base_.pre_transform,
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0, pre_transform=_base_.pre_transform),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(1 - affine_scale, 1 + affine_scale),
        border=(-img_scale[0] // 2, -img_scale[1] // 2),
        border_val=(114, 114, 114)),
    dict(type='YOLOv5HSVRandomAug'),
    dict(type='mmdet.RandomFlip', prob=0.5),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'flip', 'flip_direction'))
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=_base_.backend_args),
    dict(type='YOLOv5KeepRatioResize', scale=img_scale),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'pad_param'))
]
dataset_cfg = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=train_batch_size_per_gpu, dataset=dict(pipeline=train_pipeline, **dataset_cfg))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset_cfg))
test_dataloader = val_dataloader
optim_wrapper = dict(
    optimizer=dict(lr=base_lr, batch_size_per_gpu=train_batch_size_per_gpu))
default_hooks = dict(param_scheduler=dict(max_epochs=max_epochs))
train_cfg = dict(max_epochs=max_epochs)
