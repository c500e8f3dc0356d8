# The nine layers of YOLOv4 that GCP-SAD distils (arXiv 2306.01526), in three groups.
# The numbers count the convolutions in Darknet's order from 0.
attention_groups = [
    dict(
        name='backbone',
        weight=1e6,
        layers=[
            'backbone.stage1',  # 7
            'backbone.stage2',  # 16
            'backbone.stage3',  # 37
            'backbone.stage4',  # 58
        ]),
    dict(
        name='coarse',
        weight=1e3,
        layers=[
            'neck.upsample_layers.0.0',  # 78: 1x1 before the first upsampling, stride 32
            'neck.bottom_up_layers.1.3',  # 106: second 3x3 of the bottom-up block, stride 32
        ]),
    dict(
        name='fine',
        weight=1e4,
        layers=[
            'neck.upsample_layers.1.0',  # 85: 1x1 before the second upsampling, stride 16
            'bbox_head.head_module.convs_bridge.0',  # 92: 3x3 of the head, stride 8
            'neck.bottom_up_layers.0.4',  # 99: last 1x1 of the bottom-up block, stride 16
        ])
]
