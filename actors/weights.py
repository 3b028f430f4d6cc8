"""How an engine takes the weights that a trainer publishes, or that lie in an artifact.

The trainer cuts its parameters into buckets; a `Publication` carries handles, and the rollout worker gives each to its
engine, between `start` and `finish`. The recipe's `resources.transport` says where a bucket lies:

    shm    memory that the processes of one node share (`actors.shared`)
    cpu    Ray's object store, for any node
    ipc    GPU memory of the trainer, for engines on the same GPU (`actors.device`)
    nccl   the same, sent over a process group, for engines on other GPUs
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from actors.device import DeviceBucket, Line, Opened, SentBucket
from actors.shared import Bucket, Reader, SharedBucket

AnyBucket = Bucket | SharedBucket | DeviceBucket | SentBucket


class CoverageError(RuntimeError):
    """A publication and an engine's model do not cover each other; the message names the parameters."""


def from_array(array: NDArray[Any]) -> torch.Tensor:
    """The tensor an array of a bucket stands for; shares its memory."""
    with warnings.catch_warnings():
        # arrays out of the object store are read-only; they are only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def fetch(bucket: Any, deadline: float) -> Any:
    """What an engine takes: the object itself of a reference into Ray's object store, which engines' own ranks cannot
    read, awaited `deadline` seconds at most; any other bucket as it is."""
    return ray.get(bucket, timeout=deadline) if isinstance(bucket, ray.ObjectRef) else bucket


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
        self._reader, self._opened = Reader(), Opened(self.device)
        self._line: Line | None = None

    def init_transfer_engine(self, init_info: LineInit) -> None:
        """Join the trainer's line; without one, buckets that are sent cannot be received."""
        rank = 1 + self.parallel_config.rank
        self._line = Line.join(init_info.address, rank, init_info.size, self.device, init_info.timeout)

    def start_weight_update(self) -> None:
        self._names: dict[str, tuple[int, ...]] = {}
        self._received: dict[str, tuple[int, ...]] = {}
        self._read: list[SharedBucket | DeviceBucket] = []
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: BucketUpdate) -> None:
        self._names.update(update_info.names)
        bucket = update_info.weights
        if isinstance(bucket, bytes):
            bucket = pickle.loads(bucket)  # noqa: S301 - of our own rollout worker
        weights = self._tensors(bucket)
        self._received.update((name, tuple(value.shape)) for name, value in weights)
        self.model.load_weights(weights)

    def _tensors(self, bucket: AnyBucket) -> list[tuple[str, torch.Tensor]]:
        if isinstance(bucket, SharedBucket | DeviceBucket):
            self._read.append(bucket)
        if isinstance(bucket, DeviceBucket):
            return self._opened.read(bucket)
        if isinstance(bucket, SentBucket):
            if self._line is None:
                raise RuntimeError("weights are sent, and this engine has no line to the trainer")
            return self._line.receive(bucket)
        arrays = self._reader.read(bucket) if isinstance(bucket, SharedBucket) else bucket
        return [(name, from_array(array)) for name, array in arrays]

    def finish_weight_update(self) -> None:
        check_received(self._names, self._received)
        unfilled = list(unfilled_layers(self.model))
        if unfilled:
            raise CoverageError(
                f"the published weights leave parameters of the engine's model unfilled: {_some(unfilled)}; "
                "publish every parameter of the policy under its checkpoint name"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            prepack_experts(self.model)
            prepack_tied_head(self.model)
        else:  # the trainer writes over the memory that was read
            torch.cuda.synchronize(self.device)
        self._reader.keep(bucket for bucket in self._read if isinstance(bucket, SharedBucket))
        self._opened.keep(bucket for bucket in self._read if isinstance(bucket, DeviceBucket))

    def shutdown(self) -> None:
        return None


def check_received(published: Mapping[str, tuple[int, ...]], received: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CoverageError unless the buckets held exactly the published names, each with its shape."""
    problems = []
    if missing := [name for name in published if name not in received]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := [name for name in received if name not in published]:
        problems.append(f"unexpected {_some(unexpected)}")
    shapes = [
        f"{name} {list(received[name])} instead of {list(shape)}"
        for name, shape in published.items()
        if name in received and tuple(received[name]) != tuple(shape)
    ]
    if shapes:
        problems.append(f"wrong shapes {_some(shapes)}")
    if problems:
        raise CoverageError("the buckets are not what was published: " + "; ".join(problems))


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


def _some(names: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
