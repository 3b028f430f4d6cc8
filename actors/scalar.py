"""One number a token, by a linear head in the place of a model's language head, for critics and reward models; and one
number a reply, which a reward model says by such a head or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.likelihood import likelihoods
from rlhf.batching import Tensors
from rlhf.types import Loss, Pool, Scalar

HEAD = "reward_head.safetensors"  # beside the model in a reward model's folder: "weight" [1, hidden], how it is asked


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


def rewarded(model: Any, tensors: Tensors, scalar: Scalar, through: Any = None) -> Tensor:
    """[B] what a reward model says of every row's reply; `through`: the engine by which it is called."""
    if scalar.headed:
        return _pooled(model if through is None else through, tensors, scalar.pool)
    logprobs, _, out = likelihoods(model, tensors, Loss(), through)
    return scalar.beta * logprobs.sum(1) + _rooted(out)


def _pooled(model: Any, tensors: Tensors, pool: Pool) -> Tensor:
    """[B] what the head of one output says of every row's reply: at its "last" token, the end token or the one at which
    it was cut off; or the "mean" of what it says at each."""
    kept, places = tensors.ends() if pool == "last" else tensors.replies()
    out = model(**tensors.model_inputs(), use_cache=False, logits_to_keep=kept)
    # looked up, as the policy's logits are
    found = nn.functional.embedding(places, out.logits.flatten(0, 1))[:, 0].float()
    if pool == "last":
        return found
    each = found.new_zeros(tensors.completion.shape).masked_scatter(tensors.completion, found)
    return each.sum(1) / tensors.completion.sum(1).clamp(min=1) + _rooted(out)


def _rooted(out: Any) -> Tensor:
    """0: a row without a reply says that, and every rank must run backward through the whole model."""
    rooted: Tensor = 0.0 * out.logits.float().sum()
    return rooted


def write_head(folder: Path, weight: Tensor | None, scalar: Scalar) -> None:
    held = {} if weight is None else {"weight": weight.contiguous()}
    save_file(held, folder / HEAD, metadata={"pool": scalar.pool, "beta": repr(scalar.beta)})


def scalar_of(folder: Path) -> Scalar:
    """How the reward model of this folder is asked. Raises ValueError for a folder that holds none."""
    if not (folder / HEAD).is_file():
        raise ValueError(f"{folder} holds no reward model: name the artifact of a reward_model stage")
    with safe_open(folder / HEAD, framework="pt") as file:
        said: dict[str, Any] = file.metadata() or {}
    if said.get("pool") not in get_args(Pool):
        known = ", ".join(get_args(Pool))
        raise ValueError(f"{folder / HEAD}: its reward model is asked by {said.get('pool')!r}; known are {known}")
    return Scalar(said["pool"], float(said.get("beta", 1.0)))


def restore_head(head: nn.Linear, folder: Path) -> bool:
    """Give a head the weight that the folder holds; whether it holds one. Raises ValueError for one of another size."""
    path = folder / HEAD
    weight = load_file(path).get("weight") if path.is_file() else None
    if weight is None:
        return False
    if weight.shape != head.weight.shape:
        raise ValueError(
            f"{path} is {list(weight.shape)}, and the model beside it needs {list(head.weight.shape)}: its "
            "files are of two models; train the reward model again"
        )
    with torch.no_grad():
        head.weight.copy_(weight)
    return True
