"""The arithmetic of a piece of work, in floating-point operations, as torch counts them: attention on CPUs
too.

No test is here; benchmark.py divides by what this page counts.
"""
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def cpu_attention(q, k, v, *options, **more):
    return sdpa_flop_count(q, k, v)


def cpu_attention_backward(grad, q, k, v, *options, **more):
    return sdpa_backward_flop_count(grad, q, k, v)


# torch has formulas for CUDA's kernels alone. Without these, attention on a CPU counts as nothing.
ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
          torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward}


def count_flops(call):
    """A function of no arguments, called once -> operations of its products, convolutions and attention."""
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        call()
    return counter.get_total_flops()
