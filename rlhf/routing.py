"""What routers of a mixture of experts do with the tokens of a forward: choices, ties, balance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlhf.batching import Tensors

KINDS = ("text", "image")  # of tokens


@dataclass(frozen=True)
class Routing:
    """One router's say in one forward: logits [tokens, experts], with their gradient, and how many experts of each
    token it took."""

    logits: Tensor
    top_k: int

    def choice(self) -> Tensor:
        """[tokens, top_k] experts, best first."""
        return self.logits.detach().float().softmax(-1).sort(-1, descending=True).indices[:, : self.top_k]

    def margin(self) -> Tensor:
        """[tokens] between the probabilities of the last expert taken and the first not taken; infinite if all are."""
        ranked = self.logits.detach().float().softmax(-1).sort(-1, descending=True).values
        if self.top_k == ranked.shape[-1]:
            return torch.full_like(ranked[:, 0], torch.inf)
        return ranked[:, self.top_k - 1] - ranked[:, self.top_k]


Routed = dict[str, Routing]


@contextmanager
def routers(model: nn.Module) -> Iterator[Routed]:
    """Collect what every router says in one forward, under the name of its experts module; nothing of a dense model."""
    found: Routed = {}

    def listen(name: str, router: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[name] = Routing(output[0], output[-1].shape[-1])

        return router.register_forward_hook(hook)

    with ExitStack() as stack:
        for name, router in _routers(model).items():
            stack.callback(listen(name, router).remove)
        yield found


def lowest_margins(margins: Iterable[Tensor], tensors: Tensors) -> NDArray[np.float32]:
    """[rows, length] of one forward of these: the smallest margin of any router there or earlier in the row, since
    attention carries the other expert's result on; infinite without routers."""
    lowest = torch.full(tensors.input_ids.shape, torch.inf)
    for margin in margins:
        lowest = torch.minimum(lowest, tensors.in_rows(margin.cpu(), torch.inf))
    return np.asarray(np.minimum.accumulate(lowest.numpy(), axis=1))


@dataclass(frozen=True)
class Usage:
    """What tokens make of each expert of each layer. A token counts once for every row of weight that sees it, so sums
    do not depend on how rows are packed, or cut into micro-batches and ranks.

    chosen    [layers, 2, experts] how often text and image tokens choose it
    probable  [layers, experts] their router probabilities, summed; with a gradient
    first     [layers, experts] how often it is a token's first choice
    """

    chosen: Tensor
    probable: Tensor
    first: Tensor

    @staticmethod
    def of(routed: Routed, tensors: Tensors, image_id: int) -> Usage:
        """Of one forward of these, `image_id` being the token that stands for features of a picture."""
        seen = tensors.seen()
        pictured = tensors.given_ids() == image_id
        chosen = [_counts(routing, seen, pictured) for routing in routed.values()]
        weights = seen.float()
        probable = [weights @ routing.logits.float().softmax(-1) for routing in routed.values()]
        first = [
            torch.bincount(routing.choice()[:, 0], seen.double(), minlength=routing.logits.shape[-1])
            for routing in routed.values()
        ]
        return Usage(torch.stack(chosen), torch.stack(probable), torch.stack(first))

    def detach(self) -> Usage:
        """Without the gradient, in float64."""
        return Usage(self.chosen, self.probable.detach().double(), self.first)

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.chosen + other.chosen, self.probable + other.probable, self.first + other.first)

    def over_ranks(self) -> Usage:
        """The sum over all ranks of the process group; collective."""
        both = torch.cat((self.chosen, self.probable[:, None], self.first[:, None]), dim=1)
        torch.distributed.all_reduce(both)
        return Usage(both[:, :2], both[:, 2], both[:, 3])

    def shares(self, count: str = "chosen") -> Tensor:
        """[layers, experts] of all choices, or of tokens' "first" ones."""
        total = self.first if count == "first" else self.chosen.sum(1)
        return total / total.sum(-1, keepdim=True).clamp(min=1)

    def imbalance(self, shares: Tensor, tokens: float) -> Tensor:
        """E · Σ_e f_e · P_e, the mean over layers: f are `shares`, P these probabilities over `tokens`. 1 where either
        is uniform, E where one expert has all (Fedus 2021, eq. 4). With shares of all choices it is a top_k-th of
        transformers' `load_balancing_loss_func`; with those of first ones it is DeepSpeed's, as in MoE-LLaVA."""
        each = (shares.to(self.probable) * self.probable).sum(-1) / tokens
        return each.mean() * shares.shape[-1]

    def metrics(self) -> dict[str, float]:
        """router_aux: `imbalance` by its own shares; router_dead: experts of all layers that no token chose;
        router_entropy: log E-th part of the entropy of a layer's choices, 1 where they are uniform, the least of all
        layers; and by layer, of text and of image tokens."""
        shares, tokens = self.shares(), float(self.probable.sum(-1).max())
        found = {
            "router_aux": float(self.imbalance(shares, max(tokens, 1.0))),
            "router_dead": float((self.chosen.sum(1) == 0).sum()),
            "router_entropy": float(_spread(self.chosen.sum(1)).min()),
        }
        for place, kind in enumerate(KINDS):
            if self.chosen[:, place].any():
                each = _spread(self.chosen[:, place]).tolist()
                found |= {f"router_entropy.{kind}.{layer}": value for layer, value in enumerate(each)}
        return found


def calibrate(model: nn.Module, tensors: Tensors) -> None:
    """Turn the routers so that the tokens of these rows choose experts evenly. What all tokens have in common no longer
    speaks for any expert (router weights orthogonal to the mean input), and all experts speak equally loud and apart
    from one another (logits whitened, W ← s C^-½ W, C their covariance, s² its mean diagonal).

    For an upcycled model, whose experts are still equal: the output stays what it was, and so do the routers' inputs,
    so that one forward serves all layers."""
    known = tensors.seen() > 0

    def hook(router: nn.Module, args: tuple[Tensor, ...]) -> None:
        weight = router.get_parameter("weight")
        weight.copy_(_even(weight.double(), args[0].flatten(0, -2)[known].double()))

    with ExitStack() as stack, torch.no_grad():
        for router in _routers(model).values():
            stack.callback(router.register_forward_pre_hook(hook).remove)
        model.get_submodule("model")(**tensors.model_inputs(), use_cache=False)  # without the head


def _even(weight: Tensor, inputs: Tensor) -> Tensor:
    """Router weights [experts, width] after calibration on inputs [tokens, width]; both float64."""
    mean = inputs.mean(0)
    weight = weight - torch.outer(weight @ mean, mean) / (mean @ mean)
    logits = (inputs - mean) @ weight.T
    values, vectors = torch.linalg.eigh(logits.T @ logits / len(logits))
    size = values.mean()
    # directions in which these tokens hardly differ are not blown up
    scale = (size / values.clamp(min=1e-3 * float(size))).sqrt()
    return (vectors * scale) @ vectors.T @ weight


def _routers(model: nn.Module) -> dict[str, nn.Module]:
    """The router of every experts module, under the latter's name."""
    found: dict[str, Any] = {}
    for name, _ in model.named_modules():
        if is_experts(name):
            block = model.get_submodule(name.rpartition(".")[0])
            found[group_name(name)] = block.gate if hasattr(block, "gate") else block.router
    return found


def group_name(module_name: str) -> str:
    """The name both sides give a parameter group: the trainer's module name without the leading "model."."""
    name = module_name.removeprefix("module.").removeprefix("model.")
    # vLLM runs the router inside its experts module
    return name.removesuffix(".experts.gate") + ".gate" if name.endswith(".experts.gate") else name


def is_experts(module_name: str) -> bool:
    """Whether a module of that name holds the experts of a layer."""
    return module_name.endswith(".experts")


def _counts(routing: Routing, seen: Tensor, pictured: Tensor) -> Tensor:
    """[2, experts] how often text and image tokens choose each, a token counting as often as it is `seen` [tokens]."""
    choice, experts = routing.choice().flatten(), routing.logits.shape[-1]
    kinds = (seen * kind for kind in (~pictured, pictured))
    return torch.stack(
        [torch.bincount(choice, kind.double().repeat_interleave(routing.top_k), minlength=experts) for kind in kinds]
    )


def _spread(counts: Tensor) -> Tensor:
    """[layers] normalised entropies of counts [layers, experts]."""
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(-1) / math.log(max(shares.shape[-1], 2))
