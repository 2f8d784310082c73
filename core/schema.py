"""Every setting of training, with its default, its meaning and what it may not be."""

from dataclasses import dataclass
from typing import Literal

from core import urls
from core.architecture import ModelConfig
from core.config import require, section, setting


@dataclass(frozen=True)
class RunConfig:
    """The run and its folder."""

    url: str = setting(
        "",
        "folder for checkpoints, metrics and ledger (local, s3://, gs://, az://)",
        env="RUN_URL",
        identity=False,
        check=urls.mistake,
    )
    max_usd: float = setting(
        0.0, "hard cap in dollars over all segments: save and stop before it; 0: none", env="MAX_USD", identity=False
    )
    shutdown_reserve_seconds: float = setting(
        120.0, "paid time between the trainer's end and the machine's, kept in reserve under the cap", identity=False
    )

    def __post_init__(self):
        require(bool(self.url), "url", "is empty; set it, --run.url=... or RUN_URL")
        for key in ("max_usd", "shutdown_reserve_seconds"):
            require(0 <= getattr(self, key) < float("inf"), key, f"is {getattr(self, key)}, must not be below 0")


@dataclass(frozen=True)
class DataConfig:
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
    cache_gb: float = setting(20.0, "upper bound of that folder in GB (10^9 bytes)", identity=False)
    shards_mixed: int = setting(4, "shards that are mixed with each other, and open at a time")
    prefetch: int = setting(8, "micro-batches prepared ahead, about", identity=False)

    def __post_init__(self):
        require(bool(self.url), "url", "is empty; set it, --data.url=... or DATA_URL")
        require(self.cache_gb > 0, "cache_gb", f"is {self.cache_gb}, must be above 0")
        require(self.shards_mixed > 0, "shards_mixed", f"is {self.shards_mixed}, must be at least 1")
        require(self.prefetch > 0, "prefetch", f"is {self.prefetch}, must be at least 1")


@dataclass(frozen=True)
class BatchConfig:
    """How many tokens make one optimizer step, and how many sequences go through the model at once."""

    tokens_per_step: int = setting(524288, "tokens per optimizer step, over all ranks")
    micro_batch_size: int = setting(
        32,
        "sequences per forward pass and rank; accumulation follows. 0: the most that fit, found once",
    )

    def __post_init__(self):
        require(self.tokens_per_step > 0, "tokens_per_step", f"is {self.tokens_per_step}, must be above 0")
        require(
            self.micro_batch_size >= 0,
            "micro_batch_size",
            f"is {self.micro_batch_size}, must be above 0, or 0 for what fits",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019), or Muon (Jordan et al. 2024) for the matrices of the blocks only."""

    name: Literal["adamw", "muon"] = setting("adamw", "what updates the blocks' matrices")
    lr: float = setting(6e-4, "peak learning rate of AdamW")
    embedding_lr: float = setting(0.0, "AdamW's rate for embeddings; 0: lr")
    head_lr: float = setting(0.0, "AdamW's rate for an untied output layer; 0: lr")
    scalar_lr: float = setting(0.0, "AdamW's rate for norms, biases and skips; 0: lr")
    schedule: Literal["cosine", "linear"] = setting("cosine", "how the rates fall")
    cooldown_fraction: float = setting(1.0, "share of the steps, at the end, in which they fall; before it they stay")
    min_lr_ratio: float = setting(
        0.1, "rate at the end over the peak one; a cosine reaches it at the last step, a line one step later"
    )
    warmup_steps: int = setting(715, "steps of linear warm-up")
    weight_decay: float = setting(0.1, "AdamW's decay of matrices and embeddings; none for biases and norms")
    beta1: float = setting(0.9, "first-moment decay")
    beta2: float = setting(0.95, "second-moment decay")
    eps: float = setting(1e-8, "denominator term")
    muon_lr: float = setting(0.02, "peak learning rate of Muon")
    muon_momentum: float = setting(0.95, "Muon's momentum")
    muon_weight_decay: float = setting(0.0, "Muon's decay")
    muon_ns_steps: int = setting(5, "Newton-Schulz rounds per update")
    grad_clip: float = setting(1.0, "largest global gradient norm; 0: no clipping")
    zero: Literal[0, 1, 2] = setting(
        0,
        "ZeRO stage (Rajbhandari et al. 2020): 1: each rank keeps the optimizer state of its share of rows only; 2: "
        "and the partial gradient sums of that share, for an exchange per turn. Same results",
        identity=False,
    )

    def __post_init__(self):
        for key in ("lr", "eps", "muon_lr", "muon_ns_steps"):
            require(getattr(self, key) > 0, key, f"is {getattr(self, key)}, must be above 0")
        for key in (
            "embedding_lr",
            "head_lr",
            "scalar_lr",
            "weight_decay",
            "muon_weight_decay",
            "grad_clip",
            "warmup_steps",
        ):
            require(getattr(self, key) >= 0, key, f"is {getattr(self, key)}, must not be below 0")
        for key in ("beta1", "beta2", "muon_momentum"):
            require(0 <= getattr(self, key) < 1, key, f"is {getattr(self, key)}, must be at least 0 and below 1")
        for key in ("cooldown_fraction", "min_lr_ratio"):
            require(0 <= getattr(self, key) <= 1, key, f"is {getattr(self, key)}, must be between 0 and 1")


@dataclass(frozen=True)
class TrainLoopConfig:
    """Length, cadence, and how the step is computed."""

    steps: int = setting(19073, "optimizer steps of the whole run")
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
        0.1, "loss below which such a run stops; it fails if it is not there after `steps`", identity=False
    )
    log_every: int = setting(10, "steps between log lines; metrics have every step", identity=False)
    norms_every: int = setting(
        100, "steps between norms of updates and largest activations per block; 0: never", identity=False
    )
    eval_every: int = setting(250, "steps between validation losses; 0: only at the end", identity=False)
    eval_tokens: int = setting(10485760, "validation tokens each time, always the same ones", identity=False)
    hellaswag_every: int = setting(
        0, "steps between HellaSwag scores, if the set was stored beside the data; 0: only at the end", identity=False
    )
    hellaswag_items: int = setting(10042, "items of it, the first ones; 0: none at all", identity=False)
    sample_every: int = setting(1000, "steps between text samples; 0: only at the end", identity=False)
    sample_tokens: int = setting(48, "tokens per sample", identity=False)
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
    cpu_threads: int = setting(0, "threads per rank on a CPU; 0: cores divided by ranks", identity=False)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = setting(
        (), "also send metrics there, if installed; their failures never stop a run", identity=False
    )
    display: Literal["auto", "live", "lines"] = setting(
        "auto", "live: one picture that is kept up to date; lines: a log; auto: live on a terminal", identity=False
    )

    def __post_init__(self):
        require(self.steps > 0, "steps", f"is {self.steps}, must be above 0")
        require(
            not (self.precision == "fp8" and self.device == "cpu"),
            "precision",
            "is fp8, but device is cpu, which has no fp8 units; set fp32 or auto",
        )
        every = ("eval_every", "norms_every", "hellaswag_every", "sample_every")
        for key in (*every, "hellaswag_items", "sample_tokens", "cpu_threads"):
            require(getattr(self, key) >= 0, key, f"is {getattr(self, key)}, must not be below 0")
        for key in ("log_every", "eval_tokens", "overfit_max_loss"):
            require(getattr(self, key) > 0, key, f"is {getattr(self, key)}, must be above 0")
        require(all(step > 0 for step in self.skip_steps), "skip_steps", f"is {self.skip_steps}; steps count from 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = setting(0, "steps between checkpoints; 0: by time, from measured costs", identity=False)
    max_lost_seconds: float = setting(
        60.0, "by time: a machine that goes without notice loses at most so much work", identity=False
    )
    expected_hours_between_failures: float = setting(
        4.0, "by time: expected hours until a machine goes (spot: 1 to 20)", identity=False
    )
    keep_last: int = setting(
        2, "newest complete checkpoints to keep, at least 2: the last one may prove unreadable", identity=False
    )
    keep_every_steps: int = setting(
        0, "also keep every checkpoint at a multiple of so many steps; 0: none", identity=False
    )

    def __post_init__(self):
        for key in ("every_steps", "keep_every_steps"):
            require(getattr(self, key) >= 0, key, f"is {getattr(self, key)}, must not be below 0")
        for key in ("max_lost_seconds", "expected_hours_between_failures"):
            require(getattr(self, key) > 0, key, f"is {getattr(self, key)}, must be above 0")
        require(
            self.keep_last >= 2,
            "keep_last",
            f"is {self.keep_last}, must be at least 2, so that a damaged newest one has a predecessor",
        )


@dataclass(frozen=True)
class TrainConfig:
    """`torchrun -m trainer.train`."""

    run: RunConfig = section(RunConfig)
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    batch: BatchConfig = section(BatchConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    train: TrainLoopConfig = section(TrainLoopConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)

    def __post_init__(self):
        # A micro-batch that is still to be found is a divisor of the batch by construction.
        per_micro_batch = max(1, self.batch.micro_batch_size) * self.model.context
        require(
            self.batch.tokens_per_step % per_micro_batch == 0,
            "batch.tokens_per_step",
            f"is {self.batch.tokens_per_step}, must be a multiple of batch.micro_batch_size x model.context = "
            f"{max(1, self.batch.micro_batch_size)} x {self.model.context} = {per_micro_batch}; "
            f"the nearest is {max(1, round(self.batch.tokens_per_step / per_micro_batch)) * per_micro_batch}",
        )
        require(
            self.optimizer.warmup_steps <= self.train.steps,
            "optimizer.warmup_steps",
            f"is {self.optimizer.warmup_steps}, more than train.steps = {self.train.steps}",
        )
