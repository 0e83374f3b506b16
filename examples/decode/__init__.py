"""Parts of ``decode_low_latency.py``: the model in plain PyTorch, its weights, and the loop around it."""
