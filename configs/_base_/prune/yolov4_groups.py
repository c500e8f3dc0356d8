# The five layer groups of GCP-SAD (arXiv 2306.01526) for YOLOv4: by the stride of the
# feature map in the backbone, then by the direction of the path in the neck.
prune_cfg = dict(
    groups=[
        dict(name='stride-8', modules=['backbone.stem', 'backbone.stage[123]']),
        dict(name='stride-16', modules=['backbone.stage4']),
        dict(name='stride-32', modules=['backbone.stage5', 'neck.reduce_layers.2']),
        dict(
            name='top-down',
            modules=['neck.reduce_layers.[01]', 'neck.upsample_layers', 'neck.top_down_layers']),
        dict(
            name='bottom-up',
            modules=['neck.downsample_layers', 'neck.bottom_up_layers', 'bbox_head']),
    ],
    # Share of the parameters to keep; or give each group a ratio or a threshold
    target_params=0.353,
    merge='or',
    min_keep_ratio=0.01,
    compensate=True)
