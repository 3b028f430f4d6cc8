"""Weights on their way from the trainer to the engines: both ends of one protocol.

The trainer cuts its parameters into buckets (`TrainerRank.weights`); a `Publication` carries handles; the rollout
worker turns each into the update its engine takes (`transport(name).update`), between `start` and `finish`.

    shm    (name, array) pairs in memory that the processes of one node share (`actors.shared`)
    cpu    the same through Ray's object store, to any node; `CpuWeightTransferEngine` below loads both
    ipc    vLLM's own engine: CUDA IPC handles, trainer and engine on one GPU
    nccl   vLLM's own engine: broadcast in a process group, trainer and engine on different GPUs
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from actors.shared import Bucket, Reader, SharedBucket


class CoverageError(RuntimeError):
    """A publication and an engine's model do not cover each other; the message names the parameters."""


def from_array(array: NDArray[Any]) -> torch.Tensor:
    """The tensor an array of a bucket stands for; shares its memory."""
    with warnings.catch_warnings():
        # arrays out of the object store are read-only; they are only read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


@dataclass(frozen=True)
class Transport:
    """How weights reach an engine: `backend` is vLLM's name, `update` makes its update of a bucket and the names."""

    name: str
    backend: str
    update: Callable[[Any, Mapping[str, tuple[int, ...]]], dict[str, Any]]


def fetch(bucket: Any, reader: Reader, deadline: float) -> Any:
    """A bucket's data, of a bucket handed over as it is, in shared memory or as a Ray reference. Waits `deadline`
    seconds at most."""
    if isinstance(bucket, SharedBucket):
        return reader.read(bucket)
    return ray.get(bucket, timeout=deadline) if isinstance(bucket, ray.ObjectRef) else bucket


def transport(name: str) -> Transport:
    """The transport of that name. Raises ValueError for any but shm, cpu, ipc and nccl."""
    # vLLM's engines take the update their trainer side made (names, dtypes, shapes, handles), so a bucket is one.
    known = {
        "shm": Transport("shm", "cpu", lambda bucket, names: {"weights": bucket, "names": names}),
        "cpu": Transport("cpu", "cpu", lambda bucket, names: {"weights": bucket, "names": names}),
        "ipc": Transport("ipc", "ipc", lambda bucket, _names: dict(bucket)),
        "nccl": Transport("nccl", "nccl", lambda bucket, _names: dict(bucket)),
    }
    if name not in known:
        raise ValueError(f"no weight transport {name!r}; choose one of {', '.join(known)}")
    return known[name]


@dataclass
class CpuInit(WeightTransferInitInfo):
    """Nothing to agree on: shared memory and the object store are already there."""


@dataclass
class CpuUpdate(WeightTransferUpdateInfo):
    """One bucket, and every name of the publication with its shape."""

    weights: Bucket
    names: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class CpuWeightTransferEngine(WeightTransferEngine[CpuInit, CpuUpdate]):
    """vLLM weight transfer from arrays in memory, in checkpoint layout, by layerwise reload.

    `finish_weight_update` raises CoverageError unless the buckets held exactly the published names with their shapes
    and these filled every parameter of the model. The model is unusable after an error: restart the worker.
    """

    init_info_cls = CpuInit
    update_info_cls = CpuUpdate

    def init_transfer_engine(self, init_info: CpuInit) -> None:  # noqa: ARG002 - vLLM's signature
        return None

    def start_weight_update(self) -> None:
        self._names: dict[str, tuple[int, ...]] = {}
        self._received: dict[str, tuple[int, ...]] = {}
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: CpuUpdate) -> None:
        self._names.update(update_info.names)
        for name, array in update_info.weights:
            self._received[name] = tuple(array.shape)
        self.model.load_weights([(name, from_array(array)) for name, array in update_info.weights])

    def finish_weight_update(self) -> None:
        check_received(self._names, self._received)
        unfilled = list(unfilled_layers(self.model))
        if unfilled:
            raise CoverageError(
                f"the published weights leave parameters of the engine's model unfilled: {_some(unfilled)}; "
                "publish every parameter of the policy under its checkpoint name"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        prepack_experts(self.model)
        prepack_tied_head(self.model)

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
