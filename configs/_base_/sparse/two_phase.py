# Sparse training as by the authors of GCP-SAD: after 40 % of it, the channels above the 65th
# percentile are spared. A config adds `sparsity_hook` to its `custom_hooks`.

# Usually 1e-4 to 1e-3: a scale factor moves by up to lr / (1 - momentum) * rate per iteration
sparsity_rate = 1e-3
sparsity_hook = dict(
    type='mmgcp.DynamicSparsityHook',
    rate=sparsity_rate,
    schedule=dict(type='two_phase'),
    modules='prunable')
