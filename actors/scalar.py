"""One number a token: a linear head in the place of a model's language head, for critics and reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.batching import Tensors

HEAD = "reward_head.safetensors"  # beside the model in a reward model's folder: "weight" [1, hidden]


def one_output(model: Any, bias: bool) -> nn.Linear:
    """Give the model a head of one output, which says 0 at first, and return it. Raises ValueError for a model whose
    head cannot be replaced."""
    hidden = model.config.get_text_config().hidden_size
    head = nn.Linear(hidden, 1, bias=bias).to(next(model.parameters()).dtype)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    model.set_output_embeddings(head)
    if model.get_output_embeddings() is not head:
        raise ValueError(
            f"a {type(model).__name__} keeps its language head, so it can be no critic and no reward model"
        )
    return head


def at_ends(model: Any, tensors: Tensors) -> Tensor:
    """[B] what the head of one output says at the last token of every row: the end token, or the one at which the reply
    was cut off."""
    kept, last = tensors.ends()
    out = model(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept).logits
    # looked up, as the policy's logits are
    return nn.functional.embedding(last, out.flatten(0, 1))[:, 0].float()


def write_head(folder: Path, weight: Tensor) -> None:
    save_file({"weight": weight.contiguous()}, folder / HEAD)


def read_head(folder: Path) -> Tensor | None:
    """The head [1, hidden] that `write_head` left; None in the folder of a policy."""
    path = folder / HEAD
    return load_file(path)["weight"] if path.is_file() else None


def restore_head(head: nn.Linear, folder: Path) -> bool:
    """Give a head the weight that the folder holds; whether it holds one. Raises ValueError for one of another size."""
    weight = read_head(folder)
    if weight is None:
        return False
    if weight.shape != head.weight.shape:
        raise ValueError(
            f"{folder / HEAD} is {list(weight.shape)}, and the model beside it needs {list(head.weight.shape)}: its "
            "files are of two models; train the reward model again"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
    return True
