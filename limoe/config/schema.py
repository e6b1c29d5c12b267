"""Every setting of a run as frozen dataclasses, checked when they are built.

Fields marked [open] are not fixed by the paper; their default is this project's choice. Presets are in
`limoe.config.presets`, settings by name (command line, JSON, help) in `limoe.config.settings`.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from limoe.config.section import Choices, ConfigError, Section, setting

ACTIVATIONS = Choices("gelu_tanh", "gelu_erf", "silu", "relu", "relu_squared")
"""Those of `moe_kernels.ACTIVATIONS`, which need not be imported to read settings."""
EXTRA_LOSSES = Choices()
"""Auxiliary losses beside those of the paper: none, unless a program adds one (`limoe.train.losses.register`)."""

# The token that fills a caption up, for tokenizer and model.
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
        """Where the tokens of each modality that is there begin and end."""
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
    vocab_size: int = setting("text tokens known to the tokenizer, padding and unknown included", required=True)
    moe_layers: tuple[int, ...] = setting(
        "blocks that hold experts, counted from 0, ascending; () = dense", required=True
    )
    num_experts: int = setting("E, experts of an MoE layer", 32)
    num_choices: int = setting("K, experts that a token asks for", 1)
    capacity_factor: float = setting(
        "c of the training capacity ceil(S K c / E); evaluation drops nothing [open]", 1.05
    )
    group_examples: int = setting("examples routed as one group; 0 = the whole batch [open]", 0)
    priority: Literal["bpr", "arrival", "random", "image_first", "text_first"] = setting(
        "who is served first when an expert is full; bpr = largest gate first", "bpr"
    )
    router_noise: float = setting("std of the training noise on the router's logits, times 1/E; 0 = off", 1.0)
    activation: str = setting("activation of MLPs and experts", "gelu_tanh", choices=ACTIVATIONS)
    layer_norm_epsilon: float = setting("added to the variance in LayerNorm [open]", 1e-6)
    text_padding: Literal["keep", "mask"] = setting(
        "keep: padding is attended to, pooled and routed like text; mask: it is left out everywhere [open]", "keep"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "type of the matmuls; auto = bfloat16 on TPU and GPU, float32 on CPU", "auto"
    )
    attention: Literal["auto", "xla", "kernel"] = setting("its program; auto = the kernel on TPU, else xla", "auto")
    remat: Literal["none", "attention", "blocks"] = setting(
        "what the backward pass computes again to save memory: attention's scores, or blocks but for routing", "none"
    )
    scan_unroll: int = setting(
        "periods of a segment of equal blocks that are written out in a row; more = faster on CPU, longer to compile", 1
    )

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
    initial_scale: float = setting("multiplier of the similarities at the start (learned as its logarithm)", 10.0)
    initial_bias: float = setting("bias of the logits at the start; sigmoid only", -10.0)
    aux_weight: float = setting("times the mean of the active auxiliary losses", 0.04)
    aux_scope: Literal["batch", "group"] = setting(
        "statistics over the whole step's tokens or by group [open]", "batch"
    )
    importance: bool = setting("importance loss: equal sums of gates", True)
    importance_weight: float = setting("weight of the importance loss", 1.0)
    load: bool = setting("load loss: equal expected numbers of tokens; needs router_noise", True)
    load_weight: float = setting("weight of the load loss", 1.0)
    z: bool = setting("z-loss: small logits of the router", True)
    z_weight: float = setting("weight of the z-loss", 1.0)
    local_text: bool = setting("local entropy of text: each token sure of its expert", True)
    local_text_weight: float = setting("weight of the local entropy of text", 1.0)
    local_image: bool = setting("local entropy of images; the paper finds that it hurts", False)
    local_image_weight: float = setting("weight of the local entropy of images", 1.0)
    global_text: bool = setting("thresholded global entropy of text: enough experts take text", True)
    global_text_weight: float = setting("weight of the global entropy of text", 1.0)
    global_image: bool = setting("thresholded global entropy of images: enough experts take images", True)
    global_image_weight: float = setting("weight of the global entropy of images", 1.0)
    extra: str = setting("registered auxiliary losses and their weights, like mine=1,other=0.5; empty = none", "")
    threshold_experts_text: float = setting("experts that text shall use at least; 0 = 9 E / 32", 0.0)
    threshold_experts_image: float = setting("experts that images shall use at least; 0 = 20 E / 32", 0.0)

    def _check(self) -> None:
        self._require_positive("initial_scale")
        self._require_not_negative("aux_weight", *(f.name for f in fields(self) if f.name.endswith("_weight")))
        for name in ("threshold_experts_text", "threshold_experts_image"):
            experts = getattr(self, name)
            self._require(experts == 0 or experts >= 1, name, "must be 0 (the default share of E) or at least 1 expert")
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
        """The registered auxiliary losses that are on, with their weights; 0 for what is no number."""
        items = [item.partition("=") for item in self.extra.split(",")] if self.extra else []
        return {name.strip(): _number(value) for name, _, value in items}

    def threshold(self, modality: Literal["text", "image"], num_experts: int) -> float:
        """Threshold of the global entropy, nats: log(9 E / 32) of text and log(20 E / 32) of images unless set.

        Not positive when that is at most one expert: the loss is then never active. Paper, section 3, Eq. 2.
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
    timescale: float = setting("steps after the warm-up until the rate has fallen by sqrt(2)", 10_000.0)
    weight_decay: float = setting("share by which kernels shrink a step at the peak learning rate (decoupled)", 1e-5)
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
class DataConfig(Section):
    """Where image-text pairs come from and how they are read."""

    section = "data"

    shards: str = setting(
        "folder with training shards (*.tar as img2dataset writes them), or NAME:PATH for another registered source; "
        "empty = the embedded world",
        "",
    )
    eval_shards: str = setting("folder with evaluation shards; empty = the embedded world's held-out pairs", "")
    tokenizer: str = setting("SentencePiece .model file; empty = trained from the captions", "")
    seed: int = setting("seed of the order of the data and of the embedded world", 0)
    threads: int = setting("threads that decode images", 2)
    max_bad_share: float = setting("share of bad examples above which the run stops", 0.05)
    world_pairs: int = setting("training pairs of the embedded world", 20_480)
    cache_dir: str = setting("folder for what is generated once; empty = the user's cache folder", "")

    def _check(self) -> None:
        self._require_not_negative("seed")
        self._require_positive("threads", "world_pairs")
        self._require_below_one("max_bad_share")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Length of the run, its batch and its checkpoints."""

    section = "train"

    steps: int = setting("optimiser steps", required=True)
    batch_size: int = setting("B, image-text pairs of a step; all serve as negatives", required=True)
    accumulation: int = setting("chunks that a batch is cut into to save memory; the result is the same", 1)
    seed: int = setting("seed of the parameters and of the router noise", 0)
    checkpoint_every: int = setting("steps between two checkpoints", 1_000)
    checkpoints_kept: int = setting("newest checkpoints kept", 2)
    evaluate_every: int = setting("steps between two zero-shot evaluations on the way; 0 = only at the end", 0)
    log_every: int = setting("steps between two updates of the progress bar; metrics.jsonl has every step", 10)
    routing_every: int = setting(
        "steps between two counts by expert in metrics.jsonl; the first and the last 100 steps have them too", 200
    )

    @property
    def chunk_size(self) -> int:
        """Pairs in one chunk of a step's batch."""
        return self.batch_size // self.accumulation

    def _check(self) -> None:
        self._require_positive("steps", "accumulation", "checkpoint_every", "log_every", "routing_every")
        self._require_not_negative("seed")
        self._require(self.batch_size >= 2, "batch_size", "a contrastive loss needs at least 2 pairs")
        self._require(
            self.checkpoints_kept >= 2, "checkpoints_kept", "keep at least 2, so that a damaged newest one loses little"
        )
        self._require(
            self.batch_size % self.accumulation == 0,
            "accumulation",
            f"does not divide train.batch_size={self.batch_size}; use a divisor of it",
        )


@dataclass(frozen=True, kw_only=True)
class MeshConfig(Section):
    """How devices share the work; training gives the same result on every mesh."""

    section = "mesh"

    data: int = setting("devices that share examples only: each holds the same experts", 1)
    expert: int = setting("devices that share examples and experts; a divisor of model.num_experts", 1)
    slice: int = setting("pod slices; rows are exchanged inside a slice only", 1)
    fully_sharded: bool = setting(
        "split what is not an expert, and its optimiser state, over mesh.data instead of copying it", False
    )

    exchange_chunks: int = setting(
        "pieces of an exchange of rows between experts' devices; with more, one travels while another is worked on", 1
    )
    keep_exchanged: bool = setting(
        "with model.remat: keep exchanged rows for the backward pass instead of exchanging them again", True
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

    Raises ConfigError when a setting is ill-typed, out of range or does not fit the others.

    >>> from limoe.config.presets import preset
    >>> config = preset("b16")
    >>> config.model.num_image_tokens, config.model.tokens_per_example, config.num_groups
    (196, 212, 512)
    """

    preset: str
    model: ModelConfig
    loss: LossConfig
    optimizer: OptimizerConfig
    data: DataConfig
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
        """Every device has whole experts and equally many whole groups of each chunk."""
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
        """Groups are whole and never cut by accumulation, so that routing does not depend on the number of chunks."""
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
