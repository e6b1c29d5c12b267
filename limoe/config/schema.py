"""All settings of a run, as frozen dataclasses that check their values when they are made.

The paper does not state the values of fields marked [open]; their defaults are this project's choice. Presets are in
`limoe.config.presets`. Settings by name (command line, JSON, help) are in `limoe.config.settings`.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple

from limoe.config.data import DataConfig
from limoe.config.init import InitConfig
from limoe.config.section import ConfigError, Section, setting

ACTIVATIONS = ["gelu_tanh", "gelu_erf", "silu", "relu", "relu_squared"]
"""Names of `moe_kernels.ACTIVATIONS`, so that settings are read without importing it. A program may add its own."""
EXTRA_LOSSES: list[str] = []
"""Names of auxiliary losses that a program has added to those of the paper (`limoe.train.losses.register`)."""

# The token that pads captions, in tokenizer and model.
PAD_ID = 0


class Lengths(NamedTuple):
    """Tokens of each modality in an example as the tower gets it; 0 for a modality that is left out.

    >>> Lengths(196, 16).spans, Lengths(0, 16).spans
    (((0, 196), (196, 212)), ((0, 16),))
    """

    image: int
    text: int

    @property
    def total(self) -> int:
        """Tokens of an example."""
        return self.image + self.text

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Begin and end of the tokens of each modality that is present."""
        return tuple(span for span in ((0, self.image), (self.image, self.total)) if span[0] < span[1])


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The one tower and its MoE layers (paper sections 1 and 2)."""

    section = "model"

    depth: int = setting("Transformer blocks", required=True)
    width: int = setting("D, width of a token", required=True)
    mlp_width: int = setting("F, hidden width of the MLP and of each expert", required=True)
    num_heads: int = setting("attention heads; a divisor of width", required=True)
    patch_size: int = setting("side of a square patch, pixels; a divisor of image_size", required=True)
    image_size: int = setting("side of a square image, pixels", required=True)
    text_length: int = setting("text tokens of a caption, padding included", required=True)
    vocab_size: int = setting("different text tokens of the tokenizer, padding and unknown included", required=True)
    moe_layers: tuple[int, ...] = setting(
        "blocks that hold experts, counted from 0, ascending; () = dense", required=True
    )
    num_experts: int = setting("E, experts of an MoE layer", 32)
    num_choices: int = setting("K, experts that a token chooses", 1)
    capacity_factor: float = setting(
        "c of the training capacity ceil(S K c / E); evaluation drops nothing [open]", 1.05
    )
    group_examples: int = setting("examples routed as one group; 0 = the whole batch [open]", 0)
    priority: Literal["bpr", "arrival", "random", "image_first", "text_first"] = setting(
        "which tokens a full expert takes first; bpr = those with the largest gates", "bpr"
    )
    router_noise: float = setting("std of the training noise on the router's logits, times 1/E; 0 = off", 1.0)
    activation: str = setting("activation of MLPs and experts", "gelu_tanh", choices=ACTIVATIONS)
    layer_norm_epsilon: float = setting("added to the variance in LayerNorm [open]", 1e-6)
    text_padding: Literal["keep", "mask"] = setting(
        "keep: attend to, pool and route padding like text; mask: leave it out everywhere [open]", "keep"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "dtype of matmuls; auto = bfloat16 on TPU and GPU, float32 on CPU", "auto"
    )
    attention: Literal["auto", "xla", "kernel"] = setting("implementation; auto = the kernel on TPU, else xla", "auto")
    remat: Literal["none", "attention", "blocks"] = setting(
        "what the backward pass computes again to save memory: attention's scores, or whole blocks except routing",
        "none",
    )
    scan_unroll: int = setting("unroll of the scan over repeated blocks; more = faster on CPU, longer to compile", 1)

    @property
    def num_image_tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_example(self) -> int:
        """Image and text tokens of one example, padding included."""
        return self.num_image_tokens + self.text_length

    @property
    def lengths(self) -> Lengths:
        """Tokens of each modality in an example."""
        return Lengths(self.num_image_tokens, self.text_length)

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    def _check(self) -> None:
        self._require_positive(
            *("depth", "width", "mlp_width", "num_heads", "patch_size", "image_size", "text_length", "num_experts"),
            *("num_choices", "capacity_factor", "layer_norm_epsilon", "scan_unroll"),
        )
        self._require_not_negative("group_examples", "router_noise")
        self._require(self.vocab_size >= 3, "vocab_size", "must be at least 3 (padding, unknown and one piece)")
        below = self.image_size // self.patch_size * self.patch_size
        nearest = f"{below} or {below + self.patch_size}" if below else str(self.patch_size)
        self._require(
            self.image_size == below,
            "image_size",
            f"not a multiple of model.patch_size={self.patch_size}; use {nearest}",
        )
        self._require(
            self.width % self.num_heads == 0,
            "num_heads",
            f"does not divide model.width={self.width}; use a divisor of it",
        )
        self._require(
            list(self.moe_layers) == sorted(set(self.moe_layers)), "moe_layers", "must be ascending without repeats"
        )
        self._require(
            all(0 <= layer < self.depth for layer in self.moe_layers),
            "moe_layers",
            f"must lie in 0..{self.depth - 1} (model.depth={self.depth})",
        )
        self._require(
            self.num_choices <= self.num_experts,
            "num_choices",
            f"a token cannot choose more than model.num_experts={self.num_experts} experts",
        )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """The contrastive loss and the auxiliary losses of the routers (paper section 3)."""

    section = "loss"

    contrastive: Literal["softmax", "sigmoid"] = setting("form of the contrastive loss", "softmax")
    initial_scale: float = setting("initial factor of the similarities (its logarithm is learned)", 10.0)
    max_logit_scale: float = setting("largest factor of the similarities, kept after each step; 0 = no limit", 0.0)
    initial_bias: float = setting("initial bias of the logits; sigmoid only", -10.0)
    mask_equal_captions: bool = setting("compare no image with equal captions of other images in the batch", False)
    aux_weight: float = setting("factor of the mean of the active auxiliary losses", 0.04)
    aux_scope: Literal["batch", "group"] = setting(
        "statistics over all tokens of the step, or over each group [open]", "batch"
    )
    importance: bool = setting("importance loss: equal sums of gates", True)
    importance_weight: float = setting("weight of the importance loss", 1.0)
    load: bool = setting("load loss: equal expected numbers of tokens; needs router_noise", True)
    load_weight: float = setting("weight of the load loss", 1.0)
    z: bool = setting("z-loss: keeps the router's logits small", True)
    z_weight: float = setting("weight of the z-loss", 1.0)
    local_text: bool = setting("local entropy of text: each token prefers few experts", True)
    local_text_weight: float = setting("weight of the local entropy of text", 1.0)
    local_image: bool = setting("local entropy of images; the paper finds that it hurts", False)
    local_image_weight: float = setting("weight of the local entropy of images", 1.0)
    global_text: bool = setting("global entropy of text above a threshold: enough experts take text", True)
    global_text_weight: float = setting("weight of the global entropy of text", 1.0)
    global_image: bool = setting("global entropy of images above a threshold: enough experts take images", True)
    global_image_weight: float = setting("weight of the global entropy of images", 1.0)
    extra: str = setting("registered auxiliary losses and their weights, like mine=1,other=0.5; empty = none", "")
    threshold_experts_text: float = setting("least number of experts for text; 0 = 9 E / 32", 0.0)
    threshold_experts_image: float = setting("least number of experts for images; 0 = 20 E / 32", 0.0)

    def _check(self) -> None:
        self._require_positive("initial_scale")
        self._require_not_negative(
            "aux_weight", "max_logit_scale", *(f.name for f in fields(self) if f.name.endswith("_weight"))
        )
        for name in ("threshold_experts_text", "threshold_experts_image"):
            experts = getattr(self, name)
            self._require(experts == 0 or experts >= 1, name, "must be 0 (the default share of E) or at least 1 expert")
        limit = self.max_logit_scale or self.initial_scale
        self._require(self.initial_scale <= limit, "initial_scale", f"must be at most loss.max_logit_scale={limit}")
        items = self.extra.split(",") if self.extra else []
        self._require(len(self.extra_weights) == len(items), "extra", "each loss once, like mine=1,other=0.5")
        for name, weight in self.extra_weights.items():
            known = ", ".join(EXTRA_LOSSES) or "none"
            self._require(
                name in EXTRA_LOSSES, "extra", f"{name!r} is no registered auxiliary loss; there are: {known}"
            )
            self._require(0 < weight < math.inf, "extra", f"{name} needs a positive number, like {name}=1")

    @property
    def extra_weights(self) -> dict[str, float]:
        """Registered auxiliary losses that are on, with their weights; 0 if a weight is not a number."""
        items = [item.partition("=") for item in self.extra.split(",")] if self.extra else []
        return {name.strip(): _number(value) for name, _, value in items}

    def threshold(self, modality: Literal["text", "image"], num_experts: int) -> float:
        """Compute the threshold of the global entropy in nats; by default log(9 E / 32), for images log(20 E / 32).

        It is the logarithm of the least number of experts. If that is at most 1, the loss is never active (section 3,
        Eq. 2).
        """
        share = {"text": 9, "image": 20}[modality] / 32
        return math.log(getattr(self, f"threshold_experts_{modality}") or share * num_experts)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The optimiser and its learning rate (paper section 4)."""

    section = "optimizer"

    name: Literal["adafactor", "adamw"] = setting("optimiser", "adafactor")
    learning_rate: float = setting("peak learning rate, reached at the end of the warm-up", 1e-3)
    warmup_steps: int = setting("steps of linear warm-up", 10_000)
    cooldown_steps: int = setting("steps of linear cool-down to zero at the end", 10_000)
    timescale: float = setting("steps after the warm-up in which the rate falls by a factor of sqrt(2)", 10_000.0)
    weight_decay: float = setting("share by which kernels shrink in a step at the peak learning rate; decoupled", 1e-5)
    clip_norm: float = setting("largest global norm of the gradient; 0 = no clipping", 1.0)
    momentum: float = setting("Adafactor: momentum, kept in bfloat16; 0 = none", 0.9)
    decay: float = setting("Adafactor: exponent of the second moment's decay 1 - t^-decay", 0.8)
    beta2_cap: float = setting("Adafactor: largest decay of the second moment", 0.999)
    factored_size: int = setting("Adafactor: factor matrices whose sides are both at least this", 32)
    factored_epsilon: float = setting("Adafactor: added to the squared gradient", 1e-30)
    adam_beta1: float = setting("AdamW: decay of the first moment", 0.9)
    adam_beta2: float = setting("AdamW: decay of the second moment", 0.999)
    adam_epsilon: float = setting("AdamW: added to the root of the second moment", 1e-8)

    def _check(self) -> None:
        self._require_positive(
            "learning_rate", "timescale", "decay", "factored_size", "factored_epsilon", "adam_epsilon"
        )
        self._require_not_negative("warmup_steps", "cooldown_steps", "weight_decay", "clip_norm")
        self._require_below_one("momentum", "beta2_cap", "adam_beta1", "adam_beta2")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Length, batches, checkpoints and evaluations of a run."""

    section = "train"

    steps: int = setting("optimiser steps", required=True)
    batch_size: int = setting("B, image-text pairs of a step; each pair is compared with all others", required=True)
    accumulation: int = setting("chunks of a batch, computed one after another to save memory; same result", 1)
    seed: int = setting("seed of the parameters and of the router noise", 0)
    non_finite: Literal["stop", "skip"] = setting(
        "a step whose loss or gradient is not finite: stop the run, or skip its update and count it", "stop"
    )
    max_skipped: int = setting("steps skipped in a row after which the run stops; for non_finite=skip", 10)
    checkpoint_every: int = setting("steps between two checkpoints", 1_000)
    checkpoints_kept: int = setting("newest checkpoints kept", 2)
    evaluate_every: int = setting("steps between two zero-shot evaluations; 0 = only at the end", 0)
    log_every: int = setting("steps between two updates of the progress bar; metrics.jsonl has every step", 10)
    routing_every: int = setting(
        "steps between two lines of metrics.jsonl with counts by expert; the first and last 100 steps have them too",
        200,
    )

    @property
    def chunk_size(self) -> int:
        """Pairs in one chunk of a step's batch."""
        return self.batch_size // self.accumulation

    def _check(self) -> None:
        self._require_positive(
            *("steps", "accumulation", "max_skipped", "checkpoint_every", "log_every", "routing_every")
        )
        self._require_not_negative("seed")
        self._require(self.batch_size >= 2, "batch_size", "a contrastive loss needs at least 2 pairs")
        self._require(
            self.checkpoints_kept >= 2, "checkpoints_kept", "keep at least 2, in case the newest one is damaged"
        )
        self._require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            f"does not divide train.batch_size={self.batch_size}; use a divisor of it",
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How devices share the work. Training gives the same result on every mesh."""

    section = "mesh"

    data: int = setting("devices that split examples only: each holds the same experts", 1)
    expert: int = setting("devices that split examples and experts; a divisor of model.num_experts", 1)
    slice: int = setting("pod slices; rows are exchanged only inside a slice", 1)
    fully_sharded: bool = setting(
        "split parameters that are not experts, with their optimiser state, over mesh.data instead of copying", False
    )
    exchange_chunks: int = setting(
        "pieces of each exchange of rows; with more, one is sent while another is computed on", 1
    )
    keep_exchanged: bool = setting(
        "with model.remat: keep exchanged rows for the backward pass instead of exchanging again", True
    )

    @property
    def num_devices(self) -> int:
        """Devices of the whole mesh."""
        return self.slice * self.data * self.expert

    def _check(self) -> None:
        self._require_positive("data", "expert", "slice", "exchange_chunks")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run.

    Raises ConfigError if a setting has a wrong type, is out of range or does not fit the others.

    >>> from limoe.config.presets import preset
    >>> config = preset("b16")
    >>> config.model.num_image_tokens, config.model.tokens_per_example, config.num_groups
    (196, 212, 512)
    """

    preset: str
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    init: InitConfig = field(default_factory=InitConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig
    mesh: MeshConfig = MeshConfig()

    @property
    def num_groups(self) -> int:
        """G, routing groups of a step's whole batch."""
        return self.train.batch_size // (self.model.group_examples or self.train.batch_size)

    def __post_init__(self) -> None:
        ramps = self.optimizer.warmup_steps + self.optimizer.cooldown_steps
        if ramps > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} and "
                f"optimizer.cooldown_steps={self.optimizer.cooldown_steps} do not fit into "
                f"train.steps={self.train.steps}; lower them or raise train.steps"
            )
        self._check_mesh()
        if self.model.moe_layers:
            self._check_groups()
            self._check_losses()

    def _check_mesh(self) -> None:
        """Require whole experts, and equally many pairs of each chunk, on every device."""
        mesh, chunk, experts = self.mesh, self.train.chunk_size, self.model.num_experts
        if chunk % mesh.num_devices:
            raise ConfigError(
                f"mesh.slice={mesh.slice} x mesh.data={mesh.data} x mesh.expert={mesh.expert} = {mesh.num_devices} "
                f"devices cannot share {chunk} pairs (train.batch_size={self.train.batch_size} / train.accumulation="
                f"{self.train.accumulation}) equally; use a batch size that they divide"
            )
        if self.model.moe_layers and experts % mesh.expert:
            raise ConfigError(
                f"mesh.expert={mesh.expert} devices cannot share model.num_experts={experts} experts equally; "
                f"use one of {', '.join(str(n) for n in range(1, experts + 1) if experts % n == 0)}"
            )

    def _check_groups(self) -> None:
        """Require that chunks and devices get whole groups, so that routing does not depend on their number."""
        group, devices = self.model.group_examples, self.mesh.num_devices
        chunk = self.train.chunk_size // devices
        cutting = [f"train.accumulation={self.train.accumulation}"] * (self.train.accumulation > 1)
        cutting += [f"a mesh of {devices} devices"] * (devices > 1)
        if group == 0 and cutting:
            raise ConfigError(
                f"{' and '.join(cutting)} would cut the one routing group of the whole batch "
                f"(model.group_examples=0); set model.group_examples to a divisor of the chunk of {chunk} examples"
            )
        if group and chunk % group:
            raise ConfigError(
                f"model.group_examples={group} does not divide the chunk of {chunk} examples (train.batch_size="
                f"{self.train.batch_size} / train.accumulation={self.train.accumulation} / {devices} devices), so a "
                f"routing group would be cut; use a divisor of {chunk}"
            )

    def _check_losses(self) -> None:
        for name in ("threshold_experts_text", "threshold_experts_image"):
            if getattr(self.loss, name) > self.model.num_experts:
                raise ConfigError(
                    f"loss.{name}={getattr(self.loss, name)} is out of reach with "
                    f"model.num_experts={self.model.num_experts}; use at most that, or 0 for the default"
                )
        if self.loss.load and self.model.router_noise == 0:
            raise ConfigError(
                "loss.load=true needs router noise, which model.router_noise=0.0 switches off; set loss.load=false too"
            )
