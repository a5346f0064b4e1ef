"""DeepSpeed's configuration, from typed settings. A run keeps it in its folder as deepspeed.json.

Read by the engine (zero.py) and by whoever cuts weights up before there is one (partition.py). Which combinations are
refused is said where the settings are (`ParallelConfig`), and where the model is known.
"""

from typing import Any

from train.config import HeldIn, ParallelConfig


def deepspeed_config(config: ParallelConfig, *, max_grad_norm: float, gpu: bool) -> dict[str, Any]:
    """What deepspeed.json holds."""
    elements = config.bucket_mb * 10**6 // (2 if config.held_in is HeldIn.bfloat16 else 4)
    zero: dict[str, Any] = {
        "stage": config.zero,
        "overlap_comm": config.overlap,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements // 2 * 2,  # a rule of DeepSpeed's
    }
    if config.zero == 3:
        zero["stage3_prefetch_bucket_size"] = elements
    host = {"device": "cpu", "pin_memory": gpu}  # so that the GPU reads and writes it directly
    if config.offload_optimizer:
        zero["offload_optimizer"] = host
    if config.offload_weights:
        zero["offload_param"] = host
    return {
        # The loop counts micro-batches and tokens; these make the engine count nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "gradient_clipping": max_grad_norm,  # left out, it would be 1
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's own AdamW runs on the CPU as well, and needs no compiler
        "zero_optimization": zero,
    }
