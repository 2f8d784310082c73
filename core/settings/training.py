"""Declares the settings of training: default, meaning and bounds."""

from dataclasses import dataclass, replace
from typing import Literal

from core import urls
from core.settings.loader import Bounded, require, section, setting
from core.settings.model import ModelConfig
from core.settings.run import RunConfig


@dataclass(frozen=True)
class DataConfig(Bounded):
    """The tokens to train on, and how they are fetched and mixed."""

    url: str = setting(
        "",
        "folder with shards and manifest, as written by data_prep (local, s3://, gs://, az://)",
        env="DATA_URL",
        identity=False,
        check=urls.mistake,
    )
    cache_dir: str = setting(
        "",
        "local folder for fetched shards; empty: a folder under the system's temporary one",
        env="DATA_CACHE_DIR",
        identity=False,
        check=urls.mistake_in_folder,
    )
    cache_gb: float = setting(20.0, "largest size of cache_dir in GB (10^9 bytes)", identity=False, gt=0)
    shards_mixed: int = setting(4, "number of shards that are open at a time; their windows are mixed", ge=1)
    prefetch: int = setting(8, "approximate number of micro-batches prepared ahead", identity=False, ge=1)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.url), "url", "is empty; set it with --data.url=... or with DATA_URL")


@dataclass(frozen=True)
class BatchConfig(Bounded):
    """The tokens of an optimizer step, and the sequences of a forward pass."""

    tokens_per_step: int = setting(524288, "tokens per optimizer step, over all ranks", gt=0)
    micro_batch_size: int = setting(
        32,
        "sequences per forward pass and rank; they determine the number of accumulated micro-batches. 0: the "
        "most that fit into memory, found by the first segment of the run",
        ge=0,
    )


@dataclass(frozen=True)
class OptimizerConfig(Bounded):
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for block matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = setting("adamw", "optimizer of the blocks' matrices")
    lr: float = setting(6e-4, "peak learning rate of AdamW", gt=0)
    embedding_lr: float = setting(0.0, "AdamW's rate for embeddings; 0: lr", ge=0)
    head_lr: float = setting(0.0, "AdamW's rate for an untied output layer; 0: lr", ge=0)
    scalar_lr: float = setting(0.0, "AdamW's rate for norms, biases and skips; 0: lr", ge=0)
    schedule: Literal["cosine", "linear", "wsd"] = setting(
        "cosine",
        "shape of the decay of the learning rates. wsd: they stay at the peak, then a cooldown to 0 begins; the money "
        "left, `make anneal`, train.target_loss or train.steps decide when",
    )
    cooldown_fraction: float = setting(
        1.0, "fraction of the steps, at the end of the run, in which the learning rates decay", ge=0, le=1
    )
    min_lr_ratio: float = setting(
        0.1,
        "final rate as a share of the peak rate; cosine reaches it at the last step, linear one step later; wsd falls "
        "to 0",
        ge=0,
        le=1,
    )
    anneal_fraction: float = setting(
        0.0,
        "if schedule is wsd: fraction of the steps that the cooldown takes; 0: 0.20 with adamw, 0.35 with muon",
        identity="unless default",
        ge=0,
        lt=1,
    )
    anneal_shape: Literal["auto", "linear", "1-sqrt"] = setting(
        "auto",
        "if schedule is wsd: how the rates fall; auto: 1-sqrt with adamw, linear with muon",
        identity="unless default",
    )
    warmup_steps: int = setting(715, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(0.1, "AdamW's decay of matrices and embeddings; none for biases and norms", ge=0)
    beta1: float = setting(0.9, "AdamW's decay of the first moment", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay of the second moment", ge=0, lt=1)
    eps: float = setting(1e-8, "added to the denominator of AdamW's update", gt=0)
    muon_lr: float = setting(0.02, "peak learning rate of Muon", gt=0)
    muon_momentum: float = setting(0.95, "Muon's momentum", ge=0, lt=1)
    muon_weight_decay: float = setting(0.0, "Muon's decay", ge=0)
    muon_ns_steps: int = setting(5, "Newton-Schulz rounds per update", gt=0)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    zero: Literal[0, 1, 2] = setting(
        0,
        "ZeRO stage (Rajbhandari et al. 2020). 1: each rank keeps only the optimizer state of its share of rows. "
        "2: each rank also keeps only the partial gradient sums of its share, which needs more exchanges. The "
        "stage does not change the results",
        identity=False,
    )


@dataclass(frozen=True)
class TrainLoopConfig(Bounded):
    """Length and intervals of the run, and the computation of a step."""

    steps: int = setting(
        19073,
        "optimizer steps of the whole run; if schedule is wsd, the largest number of steps",
        gt=0,
        replaces=("tokens", "epochs"),
    )
    tokens: float = setting(
        0.0,
        "training tokens of the whole run, such as 10e9; the nearest number of steps follows; 0: use `steps`",
        identity=False,
        ge=0,
        replaces=("steps", "epochs"),
    )
    epochs: float = setting(
        0.0,
        "passes over the training tokens; the nearest number of steps follows; 0: use `steps`",
        identity=False,
        ge=0,
        replaces=("steps", "tokens"),
    )
    extend: bool = setting(
        False,
        "continue a run with more train.steps than before: from its trunk (wsd), or with a second warm-up; "
        "--extend for short",
        identity=False,
    )
    target_loss: float = setting(
        0.0,
        "if schedule is wsd: begin the cooldown once the forecast final validation loss is at most this; 0: no target",
        identity=False,
        ge=0,
    )
    seed: int = setting(1337, "seed of weights and data order")
    skip_steps: tuple[int, ...] = setting(
        (),
        "steps whose batches are skipped, to leave out batches that gave NaN or infinity; each step takes the next "
        "batch that is not skipped",
        identity=False,
    )
    overfit: bool = setting(
        False,
        "repeat one micro-batch at a constant rate and without dropout, to test that everything works; "
        "--overfit for short",
    )
    overfit_max_loss: float = setting(
        0.1,
        "loss below which a run with --overfit ends; the run fails if it does not reach this loss within `steps`",
        identity=False,
        gt=0,
    )
    log_every: int = setting(10, "steps between log lines; the stored metrics contain every step", identity=False, gt=0)
    norms_every: int = setting(
        100,
        "steps between measurements of the norms of updates and of the largest activation per block; 0: never",
        identity=False,
        ge=0,
    )
    eval_every: int = setting(250, "steps between validation losses; 0: only at the end", identity=False, ge=0)
    eval_first: bool = setting(
        True,
        "also validate and sample before the first step, if eval_every and sample_every are above 0",
        identity=False,
    )
    eval_tokens: int = setting(
        10485760,
        "number of validation tokens of each measurement; they are always the same tokens",
        identity=False,
        gt=0,
    )
    hellaswag_every: int = setting(
        0,
        "steps between HellaSwag scores, if the set is stored beside the data; 0: only at the end",
        identity=False,
        ge=0,
    )
    hellaswag_items: int = setting(
        10042, "number of HellaSwag items, starting at the first; 0: no HellaSwag", identity=False, ge=0
    )
    sample_every: int = setting(1000, "steps between text samples; 0: only at the end", identity=False, ge=0)
    sample_tokens: int = setting(48, "tokens per sample; 0: no samples", identity=False, ge=0)
    sample_prompts: tuple[str, ...] = setting(
        ("The most important thing about", "In the United States,"),
        "prompts of the samples; prompts with commas need the form of a JSON list",
        identity=False,
    )
    samples_per_prompt: int = setting(1, "texts that continue each prompt", identity=False, ge=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "device to train on", identity=False)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = setting(
        "auto",
        "number format of matrix products: auto is bf16 on a GPU, fp32 on a CPU; fp8 (blocks only) needs Hopper",
    )
    residual: Literal["fp32", "bf16"] = setting(
        "fp32",
        "number format of the residual stream between blocks; bf16 moves fewer bytes, but rounds each block's sum",
        identity="unless default",
    )
    attention: Literal["auto", "flash", "flash3", "efficient", "cudnn"] = setting(
        "auto",
        "kernel of attention on a GPU; auto: the fastest kernel measured on it, else torch's choice",
        identity="unless default",
    )
    grad_reduce_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "number format in which ranks exchange gradients; with bf16 the result depends on the number of ranks"
    )
    activation_checkpointing: bool = setting(
        False,
        "keep only the inputs of blocks for the backward pass; this needs less memory, but a third more computation",
        identity=False,
    )
    deterministic: bool = setting(
        True,
        "use only kernels that give the same bits each time, so that a resume is exact to the bit; false may be "
        "faster. A CPU always gives the same bits",
    )
    compile: bool = setting(True, "torch.compile the model (CUDA only)", identity=False)
    profile: tuple[int, ...] = setting(
        (),
        "first and last step to profile: the trace goes into the run's folder, the slowest operations into the log",
        identity=False,
    )
    cpu_threads: int = setting(0, "threads per rank on a CPU; 0: cores / ranks", identity=False, ge=0)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = setting(
        (), "trackers that get the metrics too, if installed; their failures never stop a run", identity=False
    )
    display: Literal["auto", "live", "lines"] = setting(
        "auto", "live: a panel that is updated in place; lines: a log; auto: live on a terminal", identity=False
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.tokens and self.epochs),
            "tokens",
            f"is {self.tokens:g}, and epochs is {self.epochs:g}; give one of them",
        )
        require(
            not (self.precision == "fp8" and self.device == "cpu"),
            "precision",
            "is fp8, but device is cpu, which has no fp8 units; set fp32 or auto",
        )
        require(all(step > 0 for step in self.skip_steps), "skip_steps", f"is {self.skip_steps}; steps count from 1")
        pair = self.profile[:1] + self.profile[-1:]
        require(
            not self.profile or (len(self.profile) == 2 and 0 < pair[0] <= pair[1]),
            "profile",
            f"is {list(self.profile)}; give the first and the last step, such as 20,22",
        )
        is_fp32 = self.precision == "fp32" or (self.precision == "auto" and self.device == "cpu")
        require(
            not (self.residual == "bf16" and is_fp32),
            "residual",
            "is bf16, but the products are fp32, and bf16 would round them; set train.precision=bf16, or this to fp32",
        )
        if self.attention == "auto":
            return
        said = f"is {self.attention}"
        require(self.device != "cpu", "attention", f"{said}, a kernel of GPUs, but train.device is cpu; set auto")
        require(
            not (is_fp32 and self.attention != "efficient"),
            "attention",
            f"{said}, which takes no fp32, but train.precision is fp32; set efficient or auto, or another precision",
        )
        require(
            not (self.attention == "cudnn" and self.deterministic),
            "attention",
            "is cudnn, whose backward pass may round differently each time, but train.deterministic is true; set auto, "
            "or train.deterministic=false in a new run",
        )


@dataclass(frozen=True)
class CheckpointConfig(Bounded):
    """The interval of checkpoints, and the number to keep."""

    every_steps: int = setting(
        0,
        "steps between checkpoints; 0: an interval of time, computed from measured costs and the next two settings",
        identity=False,
        ge=0,
    )
    max_lost_seconds: float = setting(
        60.0,
        "if every_steps is 0: the most work, in seconds, that is lost if a machine ends without notice",
        identity=False,
        gt=0,
    )
    expected_hours_between_failures: float = setting(
        4.0,
        "if every_steps is 0: expected hours until a machine is lost (spot: 1 to 20)",
        identity=False,
        gt=0,
    )
    keep_last: int = setting(
        2,
        "number of newest complete checkpoints to keep, at least 2, because the last one may be unreadable",
        identity=False,
        ge=2,
    )
    keep_best: bool = setting(
        True,
        "also keep the checkpoint with the lowest validation loss; a step with a new lowest loss is saved",
        identity=False,
    )
    keep_every_steps: int = setting(
        0,
        "also keep the checkpoints at multiples of this number of steps; 0: none",
        identity=False,
        ge=0,
    )
    outage_minutes: float = setting(
        15.0,
        "training stops after the store has refused checkpoints, metrics or the ledger for this many minutes; 0: never",
        identity=False,
        ge=0,
    )
    last_try_minutes: float = setting(
        10.0,
        "if training stops because its store fails, it tries to store the last step for this many minutes",
        identity=False,
        ge=0,
    )


STAGE = "the kind of training: pretrain, finetune, dpo or distil; it decides which other settings there are"


@dataclass(frozen=True)
class TrainingConfig(Bounded):
    """The settings that every stage of training has."""

    stage: Literal["pretrain", "finetune", "dpo", "distil"] = setting("pretrain", STAGE)
    run: RunConfig = section(RunConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainLoopConfig = section(TrainLoopConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.train.tokens:  # convert the tokens to a number of steps
            object.__setattr__(self, "train", of_length(self.train, self.train.tokens, self.batch.tokens_per_step))


def of_length(train: TrainLoopConfig, tokens: float, tokens_per_step: int) -> TrainLoopConfig:
    """The same settings with the number of steps that comes nearest to `tokens`, at least 1."""
    return replace(train, steps=max(1, round(tokens / tokens_per_step)), tokens=0.0, epochs=0.0)


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Next-token prediction on token shards."""

    stage: Literal["pretrain"] = setting("pretrain", STAGE)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)

    def __post_init__(self):
        super().__post_init__()
        check_batch(self, self.model.context)
        require(
            not (self.model.document_mask and self.train.attention != "auto"),
            "train.attention",
            f"is {self.train.attention}, but model.document_mask takes FlexAttention; set auto",
        )


def check_batch(settings: TrainingConfig, context: int) -> None:
    """Raises SettingError unless sequences of `context` tokens divide the batch and the warm-up ends within the run."""
    batch, optimizer, steps = settings.batch, settings.optimizer, settings.train.steps
    # A micro-batch size of 0 becomes a divisor of the batch (trainer.stages.sizing).
    size = max(1, batch.micro_batch_size)
    per_micro_batch = size * context
    require(
        batch.tokens_per_step % per_micro_batch == 0,
        "batch.tokens_per_step",
        f"is {batch.tokens_per_step}, must be a multiple of batch.micro_batch_size x model.context = "
        f"{size} x {context} = {per_micro_batch}; "
        f"the nearest is {max(1, round(batch.tokens_per_step / per_micro_batch)) * per_micro_batch}",
    )
    require(
        optimizer.warmup_steps <= steps,
        "optimizer.warmup_steps",
        f"is {optimizer.warmup_steps}, more than train.steps = {steps}; lower it, or train for more steps",
    )
