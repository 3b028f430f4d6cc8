"""The method: recipes, plans, data, the bridge, algorithms and the loops.

Nothing here imports ray, vllm or deepspeed; those live in `actors`.
"""

from rlhf import vision_ops

vision_ops.declare_on_import()
