"""The recipe: a complete, typed, frozen description of one curriculum, read from TOML.

    recipe = load(["think_fusion.toml", "toy_size.toml"], ["stages.long-cot.lr = 1e-4"])

Files compose left to right, then overrides. Tables merge key by key; `stages` merge by stage name, so an override
file may change one field of one stage, of all stages of a kind (`stages."*".sft.steps`) or of all sources (`data."*"`).
What is one thing is replaced whole: a stage's `data`, `train` and `drop`, and a source that turns from a builder to a
path. An override may still change one key of it (`stages.NAME.data.text = 1`), and `{ remove = true }` removes a stage,
a source or a reward. An unknown key is an error that names the nearest known one.
"""

from rlhf.recipe.cluster import ClusterTable, NodesTable
from rlhf.recipe.composition import RecipeError, load, load_judge, validate
from rlhf.recipe.rewards import JudgeTable, Judging, Reward
from rlhf.recipe.schema import Recipe
from rlhf.recipe.settings import BUILDERS, Chat, Deadlines, Evaluation, Model, Resources, Source, Tokenizer, Tracking
from rlhf.recipe.stages import (
    Draws,
    Evaluate,
    Gate,
    Lora,
    Merge,
    Optimised,
    Pairs,
    Part,
    Preference,
    Rebuild,
    RewardModel,
    Rl,
    Search,
    Sft,
    Stage,
    Synthesize,
    Upcycle,
    makes_model,
    trains,
)
from rlhf.recipe.table import Implementation, Slot, SparseLayers

__all__ = [
    "BUILDERS",
    "Chat",
    "ClusterTable",
    "Deadlines",
    "Draws",
    "Evaluate",
    "Evaluation",
    "Gate",
    "Implementation",
    "JudgeTable",
    "Judging",
    "Lora",
    "Merge",
    "Model",
    "NodesTable",
    "Optimised",
    "Pairs",
    "Part",
    "Preference",
    "Rebuild",
    "Recipe",
    "RecipeError",
    "Resources",
    "Reward",
    "RewardModel",
    "Rl",
    "Search",
    "Sft",
    "Slot",
    "Source",
    "SparseLayers",
    "Stage",
    "Synthesize",
    "Tokenizer",
    "Tracking",
    "Upcycle",
    "load",
    "load_judge",
    "makes_model",
    "trains",
    "validate",
]
