"""One number a token: a linear head in the place of a model's language head, for critics and reward models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.batching import Tensors
from rlhf.types import Pool

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


def pooled(model: Any, tensors: Tensors, pool: Pool) -> Tensor:
    """[B] what the head of one output says of every row's reply: at its "last" token, the end token or the one at which
    it was cut off; or the "mean" of what it says at each."""
    kept, places = tensors.ends() if pool == "last" else tensors.replies()
    out = model(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept).logits
    # looked up, as the policy's logits are
    found = nn.functional.embedding(places, out.flatten(0, 1))[:, 0].float()
    if pool == "last":
        return found
    each = found.new_zeros(tensors.completion.shape).masked_scatter(tensors.completion, found)
    means = each.sum(1) / tensors.completion.sum(1).clamp(min=1)
    # a row without a reply says 0, and every rank must run backward through the whole model
    return means + 0.0 * out.float().sum()


def write_head(folder: Path, weight: Tensor, pool: Pool) -> None:
    save_file({"weight": weight.contiguous()}, folder / HEAD, metadata={"pool": pool})


def pool_of(folder: Path) -> Pool:
    """How the reward model of this folder is asked. Raises ValueError for a folder that holds none."""
    if not (folder / HEAD).is_file():
        raise ValueError(f"{folder} holds no reward model: name the artifact of a reward_model stage")
    with safe_open(folder / HEAD, framework="pt") as file:
        return "mean" if (file.metadata() or {}).get("pool") == "mean" else "last"


def restore_head(head: nn.Linear, folder: Path) -> bool:
    """Give a head the weight that the folder holds; whether it holds one. Raises ValueError for one of another size."""
    path = folder / HEAD
    if not path.is_file():
        return False
    weight = load_file(path)["weight"]
    if weight.shape != head.weight.shape:
        raise ValueError(
            f"{path} is {list(weight.shape)}, and the model beside it needs {list(head.weight.shape)}: its "
            "files are of two models; train the reward model again"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
    return True
