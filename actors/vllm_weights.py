"""How vLLM takes the weights of `actors.weights`: as a weight transfer of its own, which its ranks call."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.weights import AnyBucket, CoverageError, Receiver, some


@dataclass
class LineInit(WeightTransferInitInfo):
    """Where the trainer listens for the engine's end of a line: "host:port", the processes of the group, seconds."""

    address: str
    size: int
    timeout: float


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket, pickled where the engine's ranks are processes of their own, and every name of the publication with
    its shape."""

    weights: AnyBucket | bytes
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class BucketTransferEngine(WeightTransferEngine[LineInit, BucketUpdate]):
    """vLLM weight transfer of buckets in checkpoint layout, wherever they lie, by layerwise reload.

    `finish_weight_update` raises CoverageError unless the buckets held exactly the published names with their shapes
    and these filled every parameter of the model. The model is unusable after an error: restart the worker.
    """

    init_info_cls = LineInit
    update_info_cls = BucketUpdate

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._receiver = Receiver(self.device)

    def init_transfer_engine(self, init_info: LineInit) -> None:
        rank = 1 + self.parallel_config.rank
        self._receiver.join(init_info.address, rank, init_info.size, init_info.timeout)

    def start_weight_update(self) -> None:
        self._receiver.begin()
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketUpdate) -> None:
        bucket = update_info.weights
        if isinstance(bucket, bytes):
            bucket = pickle.loads(bucket)  # noqa: S301 - of our own rollout worker
        self.model.load_weights(self._receiver.take(bucket, update_info.names))

    def finish_weight_update(self) -> None:
        self._receiver.check()
        unfilled = list(unfilled_layers(self.model))
        if unfilled:
            raise CoverageError(
                f"the published weights leave parameters of the engine's model unfilled: {some(unfilled)}; "
                "publish every parameter of the policy under its checkpoint name"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            prepack_experts(self.model)
            prepack_tied_head(self.model)
        self._receiver.finish()

    def shutdown(self) -> None:
        return None


def unfilled_layers(model: torch.nn.Module) -> Iterator[str]:
    """Modules of a model under layerwise reload whose parameters were not all loaded, with the elements they got.

    A fused parameter (q, k and v in one) counts element by element, so one missing part shows.
    """
    short: list[tuple[str, int, int, set[int]]] = []
    filled: set[int] = set()
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        live = (
            info.kernel_tensors[0] if info.kernel_tensors is not None else dict(layer.named_parameters(recurse=False))
        )
        # a packed weight is empty, and all empty tensors share the address 0
        addresses = {parameter.data_ptr() for parameter in live.values()} - {0}
        expected = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        if isinstance(layer, VocabParallelEmbedding):
            # vLLM pads the vocabulary; a checkpoint holds the unpadded rows
            shard = layer.shard_indices
            expected -= (shard.num_org_elements_padded - shard.num_org_elements) * layer.embedding_dim
        if info.can_load() and info.load_numel < expected:
            short.append((name, info.load_numel, expected, addresses))
        else:
            filled |= addresses
    for name, loaded, expected, addresses in short:
        if not addresses or not addresses <= filled:  # else it is tied to a parameter that was loaded
            yield f"{name} ({loaded} of {expected} elements)"


def prepack_experts(model: torch.nn.Module) -> None:
    """Pack reloaded experts for the CPU kernel, in place.

    For vLLM 0.32 on CPU: packing runs on first load only, so after a layerwise reload the kernel would read raw
    expert weights as packed ones, and nothing raises.
    """
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is None:
            continue
        before = dict(module.named_parameters(recurse=False))
        kernel.fused_experts.process_weights_after_loading(module)
        for name, old in before.items():
            new = getattr(module, name)
            if new is not old:
                old.data.copy_(new.data)
                delattr(module, name)
                module.register_parameter(name, old)


def prepack_tied_head(model: torch.nn.Module) -> None:
    """Pack the language-model head again from its reloaded weight, wherever the model keeps it.

    For vLLM 0.32 on CPU: a head tied to the embedding keeps the packed copy made on first load.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "lm_head" and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
