"""Parts of ``pretrain_megatron_moe.py``: one file for each thing that a training job does."""
