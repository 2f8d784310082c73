"""Every setting of training, with its default, its meaning and what it may not be."""

from dataclasses import dataclass
from typing import Literal

from core import urls
from core.settings.loader import Bounded, require, section, setting
from core.settings.model import ModelConfig


@dataclass(frozen=True)
class RunConfig(Bounded):
    """The run and its folder."""

    url: str = setting(
        "",
        "folder for checkpoints, metrics and ledger (local, s3://, gs://, az://)",
        env="RUN_URL",
        identity=False,
        check=urls.mistake,
    )
    max_usd: float = setting(
        0.0,
        "hard cap in dollars over all segments: save and stop before it; 0: none",
        env="MAX_USD",
        identity=False,
        ge=0,
    )
    shutdown_reserve_seconds: float = setting(
        120.0,
        "paid time between the trainer's end and the machine's, kept in reserve under the cap",
        identity=False,
        ge=0,
    )

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.url), "url", "is empty; set it, --run.url=... or RUN_URL")


@dataclass(frozen=True)
class DataConfig(Bounded):
    """Where batches come from."""

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
    cache_gb: float = setting(20.0, "upper bound of that folder in GB (10^9 bytes)", identity=False, gt=0)
    shards_mixed: int = setting(4, "shards that are mixed with each other, and open at a time", ge=1)
    prefetch: int = setting(8, "micro-batches prepared ahead, about", identity=False, ge=1)

    def __post_init__(self):
        super().__post_init__()
        require(bool(self.url), "url", "is empty; set it, --data.url=... or DATA_URL")


@dataclass(frozen=True)
class BatchConfig(Bounded):
    """How many tokens make one optimizer step, and how many sequences go through the model at once."""

    tokens_per_step: int = setting(524288, "tokens per optimizer step, over all ranks", gt=0)
    micro_batch_size: int = setting(
        32,
        "sequences per forward pass and rank; accumulation follows. 0: the most that fit, found once",
        ge=0,
    )


@dataclass(frozen=True)
class OptimizerConfig(Bounded):
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices of the blocks only."""

    name: Literal["adamw", "muon"] = setting("adamw", "what updates the blocks' matrices")
    lr: float = setting(6e-4, "peak learning rate of AdamW", gt=0)
    embedding_lr: float = setting(0.0, "AdamW's rate for embeddings; 0: lr", ge=0)
    head_lr: float = setting(0.0, "AdamW's rate for an untied output layer; 0: lr", ge=0)
    scalar_lr: float = setting(0.0, "AdamW's rate for norms, biases and skips; 0: lr", ge=0)
    schedule: Literal["cosine", "linear"] = setting("cosine", "how the rates fall")
    cooldown_fraction: float = setting(
        1.0, "share of the steps, at the end, in which they fall; before it they stay", ge=0, le=1
    )
    min_lr_ratio: float = setting(
        0.1,
        "rate at the end over the peak one; a cosine reaches it at the last step, a line one step later",
        ge=0,
        le=1,
    )
    warmup_steps: int = setting(715, "steps of linear warm-up", ge=0)
    weight_decay: float = setting(0.1, "AdamW's decay of matrices and embeddings; none for biases and norms", ge=0)
    beta1: float = setting(0.9, "first-moment decay", ge=0, lt=1)
    beta2: float = setting(0.95, "second-moment decay", ge=0, lt=1)
    eps: float = setting(1e-8, "denominator term", gt=0)
    muon_lr: float = setting(0.02, "peak learning rate of Muon", gt=0)
    muon_momentum: float = setting(0.95, "Muon's momentum", ge=0, lt=1)
    muon_weight_decay: float = setting(0.0, "Muon's decay", ge=0)
    muon_ns_steps: int = setting(5, "Newton-Schulz rounds per update", gt=0)
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping", ge=0)
    zero: Literal[0, 1, 2] = setting(
        0,
        "ZeRO stage (Rajbhandari et al. 2020): 1: each rank keeps the optimizer state of its share of rows only; 2: "
        "and the partial gradient sums of that share, for an exchange per turn. Same results",
        identity=False,
    )


@dataclass(frozen=True)
class TrainLoopConfig(Bounded):
    """Length, cadence, and how the step is computed."""

    steps: int = setting(19073, "optimizer steps of the whole run", gt=0)
    seed: int = setting(1337, "seed of weights and data order")
    skip_steps: tuple[int, ...] = setting(
        (),
        "steps whose data is left out, after they made numbers that are not finite: step s then takes the next "
        "batch that is not in the list",
        identity=False,
    )
    overfit: bool = setting(
        False,
        "one micro-batch again and again, at a constant rate and without dropout, to see that everything works; "
        "--overfit for short",
    )
    overfit_max_loss: float = setting(
        0.1,
        "loss below which such a run stops; it fails if it is not there after `steps`",
        identity=False,
        gt=0,
    )
    log_every: int = setting(10, "steps between log lines; metrics have every step", identity=False, gt=0)
    norms_every: int = setting(
        100,
        "steps between norms of updates and largest activations per block; 0: never",
        identity=False,
        ge=0,
    )
    eval_every: int = setting(250, "steps between validation losses; 0: only at the end", identity=False, ge=0)
    eval_tokens: int = setting(10485760, "validation tokens each time, always the same ones", identity=False, gt=0)
    hellaswag_every: int = setting(
        0,
        "steps between HellaSwag scores, if the set was stored beside the data; 0: only at the end",
        identity=False,
        ge=0,
    )
    hellaswag_items: int = setting(10042, "items of it, the first ones; 0: none at all", identity=False, ge=0)
    sample_every: int = setting(1000, "steps between text samples; 0: only at the end", identity=False, ge=0)
    sample_tokens: int = setting(48, "tokens per sample", identity=False, ge=0)
    sample_prompts: tuple[str, ...] = setting(
        ("The most important thing about", "In the United States,"), "what samples continue", identity=False
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to train", identity=False)
    precision: Literal["auto", "fp32", "bf16", "fp8"] = setting(
        "auto",
        "of matrix products: auto is bf16 on a GPU and fp32 on a CPU; fp8 (blocks only) needs Hopper or newer",
    )
    grad_reduce_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "of gradients on their way between ranks; with bf16 the bits depend on the number of ranks"
    )
    activation_checkpointing: bool = setting(
        False, "keep only block inputs for the backward pass: less memory, a third more work", identity=False
    )
    deterministic: bool = setting(
        True,
        "on a GPU only kernels that give the same bits each time, so that a resume is exact to the bit; false may be "
        "faster. A CPU's always do",
    )
    compile: bool = setting(True, "torch.compile the model (CUDA only)", identity=False)
    compile_cache: bool = setting(
        False,
        "keep compiled kernels in the run's folder; they hold pickles, so whoever may write there may run code here",
        identity=False,
    )
    cpu_threads: int = setting(0, "threads per rank on a CPU; 0: cores divided by ranks", identity=False, ge=0)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = setting(
        (), "also send metrics there, if installed; their failures never stop a run", identity=False
    )
    display: Literal["auto", "live", "lines"] = setting(
        "auto", "live: one picture that is kept up to date; lines: a log; auto: live on a terminal", identity=False
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.precision == "fp8" and self.device == "cpu"),
            "precision",
            "is fp8, but device is cpu, which has no fp8 units; set fp32 or auto",
        )
        require(all(step > 0 for step in self.skip_steps), "skip_steps", f"is {self.skip_steps}; steps count from 1")


@dataclass(frozen=True)
class CheckpointConfig(Bounded):
    """When to save, and what to keep."""

    every_steps: int = setting(0, "steps between checkpoints; 0: by time, from measured costs", identity=False, ge=0)
    max_lost_seconds: float = setting(
        60.0,
        "by time: a machine that goes without notice loses at most so much work",
        identity=False,
        gt=0,
    )
    expected_hours_between_failures: float = setting(
        4.0,
        "by time: expected hours until a machine goes (spot: 1 to 20)",
        identity=False,
        gt=0,
    )
    keep_last: int = setting(
        2,
        "newest complete checkpoints to keep, at least 2: the last one may prove unreadable",
        identity=False,
        ge=2,
    )
    keep_every_steps: int = setting(
        0,
        "also keep every checkpoint at a multiple of so many steps; 0: none",
        identity=False,
        ge=0,
    )


STAGE = "the kind of training: pretrain, finetune, dpo or distil; it decides which other settings there are"


@dataclass(frozen=True)
class TrainingConfig:
    """The settings that every stage of training has."""

    stage: Literal["pretrain", "finetune", "dpo", "distil"] = setting("pretrain", STAGE)
    run: RunConfig = section(RunConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainLoopConfig = section(TrainLoopConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Next-token prediction on token shards."""

    stage: Literal["pretrain"] = setting("pretrain", STAGE)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)

    def __post_init__(self):
        check_batch(self, self.model.context)


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
        f"is {optimizer.warmup_steps}, more than train.steps = {steps}",
    )
