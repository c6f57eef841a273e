"""Bytes that training holds on a device, by formula: for GPUs, which this program has not been measured on.

Model states (weights, gradients, optimizer): Rajbhandari et al. 2020, "ZeRO", arXiv:1910.02054. Full-parameter training
in mixed precision with Adam holds 2 + 2 + 12 bytes a parameter: bfloat16 weights and gradients; float32 weights and two
moments. LoRA holds 2 for a frozen parameter and 4 + 4 + 8 for one of the adapter, which stays float32. Stage 1 divides
the optimizer among N devices, stage 2 the gradients too, stage 3 the weights too.

Activations: Korthikanti et al. 2022, arXiv:2205.05198, count 34 bytes x sequence x batch x width a layer of a GPT, of
which 2 are dropout masks; attention's 5 x heads x sequence / width are gone where it is computed block by block (Dao et
al. 2022, arXiv:2205.14135). ``activation_bytes`` counts in the same way what a layer with other sizes keeps. With
checkpointing (Chen et al. 2016, arXiv:1604.06174) a layer's input is kept, and one layer at a time computed again.

Offloading: Ren et al. 2021, arXiv:2101.06840 (optimizer and gradients), Rajbhandari et al. 2021, arXiv:2104.07857
(weights too, with stage 3).
"""

from dataclasses import dataclass
from typing import Literal

from tunesmith.planning.shapes import Adapter, ModelShape

Offload = Literal["none", "optimizer", "weights", "all"]
_HALF, _SINGLE = 2, 4
# A head's loss: logits in bfloat16, in float32, and their gradient in float32.
_LOGIT = _HALF + _SINGLE + _SINGLE


@dataclass(frozen=True)
class Sharding:
    """ZeRO's ``stage`` (0: every device holds everything), and what is kept in main memory.

    ``offload``: "optimizer": the optimizer and, from stage 2 on, the gradients; "weights", with stage 3: the weights;
    "all": both.
    """

    stage: int = 0
    offload: Offload = "none"

    @property
    def name(self) -> str:
        """For people."""
        stage = f"ZeRO-{self.stage}" if self.stage else "no sharding"
        kept = {
            "none": "", "optimizer": " + optimizer offload", "weights": " + weight offload", "all": " + full offload",
        }  # fmt: skip
        return stage + kept[self.offload]

    @property
    def offloads_optimizer(self) -> bool:
        return self.offload in ("optimizer", "all")

    @property
    def offloads_weights(self) -> bool:
        return self.offload in ("weights", "all")


PLAIN = Sharding()
SHARDINGS = (
    PLAIN, Sharding(1), Sharding(2), Sharding(3), Sharding(1, "optimizer"), Sharding(2, "optimizer"),
    Sharding(3, "optimizer"), Sharding(3, "all"),
)  # fmt: skip


@dataclass(frozen=True)
class Element:
    """Bytes a trained parameter takes as weight, gradient and in the optimizer."""

    weight: int
    gradient: int
    optimizer: int


MIXED = Element(_HALF, _HALF, 3 * _SINGLE)
FLOAT32 = Element(_SINGLE, _SINGLE, 2 * _SINGLE)


@dataclass(frozen=True)
class Footprint:
    """Bytes on one device, by what they are for; ``host``: in main memory, for this device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head


@dataclass(frozen=True)
class States:
    """Bytes of model states on one of several devices; ``host``: in main memory, for this device."""

    weights: int
    gradients: int
    optimizer: int
    host: int


def model_states(
    trained: int, frozen: int, element: Element, frozen_bytes: int, largest: int, sharding: Sharding, devices: int
) -> States:  # fmt: skip
    """Weights, gradients and optimizer on one device.

    Args:
        trained, frozen: parameters.
        element: bytes of a trained parameter, ``frozen_bytes``: of a frozen one.
        largest: parameters of the largest part that stage 3 gathers at once: a layer, or the embeddings. Two are
            present, one in use and one on its way; together with the device's share never more than all weights. The
            same holds of gradients from stage 2 on.
    """
    weights = trained * element.weight + frozen * frozen_bytes
    gradients, optimizer = trained * element.gradient, trained * element.optimizer
    stage, host = sharding.stage, 0
    if stage >= 1:
        optimizer = -(-optimizer // devices)
    if stage >= 2:
        share, passing = -(-gradients // devices), 2 * min(largest, trained) * element.gradient
        kept = share
        if sharding.offloads_optimizer:
            host, kept = host + share, 0
        # They leave as they are made: of one part while the next is on its way.
        gradients = (
            min(gradients, kept + passing) if devices > 1 or sharding.offloads_optimizer else gradients
        )
    if sharding.offloads_optimizer:
        host, optimizer = host + optimizer, 0
    if stage >= 3:
        share = -(-weights // devices)
        gathered = 2 * largest * max(element.weight if not frozen else 0, frozen_bytes if frozen else 0)
        kept = share
        if sharding.offloads_weights:
            host, kept = host + share, 0
        weights = min(weights, kept + gathered) if devices > 1 or sharding.offloads_weights else weights
    return States(weights, gradients, optimizer, host)


def gpu_footprint(
    shape: ModelShape, adapter: Adapter | None, tokens: int, targets: int, checkpointing: bool,
    sharding: Sharding = PLAIN, devices: int = 1,
) -> Footprint:  # fmt: skip
    """One GPU of ``devices``, each with a micro-batch of its own.

    Args:
        adapter: None: every weight is trained.
        tokens: of a micro-batch; ``targets``: those of them that are predicted.
        checkpointing: whether layers are computed again in the backward pass.
    """
    if adapter is None:
        states = model_states(shape.parameters, 0, MIXED, _HALF, shape.largest, sharding, devices)
    else:
        states = model_states(
            adapter.parameters, shape.parameters, FLOAT32, _HALF, shape.largest, sharding, devices
        )
    return Footprint(
        states.weights,
        states.gradients,
        states.optimizer,
        activation_bytes(shape, adapter, tokens, checkpointing),
        targets * (_LOGIT * shape.vocabulary + _HALF * shape.width),
        states.host,
    )


def single_footprint(
    shape: ModelShape, adapter: Adapter | None, tokens: int, targets: int, checkpointing: bool
) -> Footprint:
    """The same in float32 on one device, for models on a CPU that the memory model of this program does not cover."""
    trained, frozen = (adapter.parameters, shape.parameters) if adapter else (shape.parameters, 0)
    states = model_states(trained, frozen, FLOAT32, _SINGLE, shape.largest, PLAIN, 1)
    return Footprint(
        states.weights,
        states.gradients,
        states.optimizer,
        activation_bytes(shape, adapter, tokens, checkpointing) * _SINGLE // _HALF,
        targets * _SINGLE * (3 * shape.vocabulary + shape.width),
    )


def activation_bytes(shape: ModelShape, adapter: Adapter | None, tokens: int, checkpointing: bool) -> int:
    """What the layers keep of a micro-batch until its backward pass."""
    beside = adapter_token_bytes(adapter) if adapter else 0
    layer = tokens * (layer_token_bytes(shape, is_frozen=adapter is not None) + beside)
    if checkpointing:
        return tokens * shape.layers * _HALF * shape.width + layer
    return shape.layers * layer


def layer_token_bytes(shape: ModelShape, *, is_frozen: bool) -> int:
    """Bytes a token that autograd keeps of a layer of transformers in bfloat16, on packed rows.

    Of each norm its input (an RMSNorm: in float32) and, to train weights, what it gives (an RMSNorm: twice, before and
    after its own weight); queries, keys and values of as many heads, what attention gives, and its copy row by row for
    the next product; of the MLP its inner states, activated, and of a gated one the other half and the product; for
    each expert that a token goes to, what the expert gives, and to train weights its copy of the state. Frozen
    matrices need no copy of their inputs: the adapters' own are counted by ``adapter_token_bytes``. For a GPT, whose
    queries are as wide as its states and the MLP four times as wide, this is 34 bytes x width: the paper's, less the
    dropout masks and with the copy.
    """
    if shape.is_rms:
        norms = 2 * _SINGLE if is_frozen else 2 * (_SINGLE + 2 * _HALF)
    else:
        norms = 2 * _HALF if is_frozen else 4 * _HALF
    attention = _HALF * (4 if is_frozen else 5)
    inner = _HALF * ((4 if shape.is_gated else 2) - is_frozen)
    routed = _HALF * (2 - is_frozen) * shape.routed
    return (norms + routed) * shape.width + attention * shape.queries + inner * shape.inner


def adapter_token_bytes(adapter: Adapter) -> int:
    """Bytes a token that the adapters of a layer keep as PEFT computes them: a copy of each adapted layer's input in
    the type of the product, a mask of one byte a number where there is dropout, and the low product."""
    mask = 1 if adapter.dropout else 0
    return (_HALF + mask) * adapter.layer_inputs + _HALF * adapter.layer_ranks
