"""The recipe: a complete, typed, frozen description of one curriculum, read from TOML.

    recipe = load(["think_fusion.toml", "toy_size.toml"], ["stages.long-cot.lr = 1e-4"])

Files compose left to right, then overrides. Tables merge key by key; `stages` merge by stage name, so an override
file may change one field of one stage, of all stages of a kind (`stages."*".sft.steps`) or of all sources (`data."*"`).
What is one thing is replaced whole: a stage's `data`, `train` and `drop`, and a source that turns from a builder to a
path. An override may still change one key of it (`stages.NAME.data.text = 1`), and `{ remove = true }` removes a stage,
a source or a reward. An unknown key is an error that names the nearest known one.
"""

from rlhf.recipe.composition import RecipeError, load, validate
from rlhf.recipe.schema import (
    BUILDERS,
    Chat,
    Deadlines,
    Draws,
    Evaluate,
    Evaluation,
    Gate,
    Implementation,
    JudgeTable,
    Judging,
    Lora,
    Merge,
    Model,
    Optimised,
    Part,
    Preference,
    Rebuild,
    Recipe,
    Resources,
    Reward,
    Rl,
    Search,
    Sft,
    Slot,
    Source,
    SparseLayers,
    Stage,
    Synthesize,
    Tokenizer,
    Tracking,
    Upcycle,
    makes_model,
)

__all__ = [
    "BUILDERS",
    "Chat",
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
    "Optimised",
    "Part",
    "Preference",
    "Rebuild",
    "Recipe",
    "RecipeError",
    "Resources",
    "Reward",
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
    "makes_model",
    "validate",
]
