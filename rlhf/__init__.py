"""The method: recipes, plans, data, the bridge, algorithms and the loops.

Nothing here imports ray, vllm or deepspeed; those live in `actors`.
"""
