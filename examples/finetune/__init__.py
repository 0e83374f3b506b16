"""Parts of ``finetune_deepspeed_moe.py``: one file for each thing that the job does."""
