"""Builds the sides of bench.train_step: a training step of the same model, as different trainers do it.

Each builder returns a Side. Other trainers are not part of this project: their builders load them from checkouts in a
folder that the command line names.
"""

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from core.settings.training import PretrainConfig
from trainer.loop.numbers import Gate
from trainer.model.gpt import GPT
from trainer.model.kernels import use_attention
from trainer.model.precision import autocast
from trainer.optim.optimizer import BlockOptimizer
from trainer.optim.reduce import TreeReducer, clip
from trainer.stages.pretrain import NextToken


@dataclasses.dataclass
class Side:
    """One training step in pieces.

    `begin` clears gradients. `context(i)` wraps forward and backward of micro-batch i, and `done(i)` follows.
    `forward(tokens)` returns the loss of a micro-batch (sequences, context + 1), and `finish` clips and updates. If
    `scales` is true, the side scales the loss itself. Otherwise the loss is divided by the number of micro-batches
    before its backward pass.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    finish: Callable[[], None]
    begin: Callable[[], None]
    context: Callable[[int], object]
    done: Callable[[int], None] = lambda _: None
    scales: bool = False


def ours(settings: PretrainConfig, device: torch.device, accumulation: int) -> Side:
    """The step of trainer.loop.loop, built from the trainer's parts."""
    train = settings.train
    use_attention(train.attention, device, train.deterministic)
    model = GPT(settings.model, train.activation_checkpointing, train.residual)
    model.initialise(1)
    model.to(device)
    optimizer = BlockOptimizer(model, settings.optimizer, rank=0, world=1)
    if device.type == "cuda":
        model.compile_blocks()
    ddp = DistributedDataParallel(NextToken(model, 1 / accumulation), gradient_as_bucket_view=True)
    reducer = TreeReducer(ddp, accumulation)
    gate = Gate(device)
    losses: list[torch.Tensor] = []

    def begin() -> None:
        losses.clear()
        reducer.reset()

    def forward(tokens_BT: torch.Tensor) -> torch.Tensor:
        with autocast(device, train.precision):
            loss = ddp(tokens_BT)
        losses.append(loss.detach())
        return loss

    def finish() -> None:
        norm = clip(reducer.parameters, settings.optimizer.grad_clip)
        optimizer.step(1.0, gate.check(torch.stack([*losses, norm])))

    return Side(forward, finish, begin, reducer.context, reducer.micro_batch_done, scales=True)


def plain(settings: PretrainConfig, device: torch.device, accumulation: int, compiled: bool = False) -> Side:
    """Trains the same model in the way of teaching code: with complete logits, F.cross_entropy and torch's AdamW."""
    model = GPT(settings.model)
    model.initialise(1)
    model.to(device)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    config = settings.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        fused=device.type == "cuda",
    )
    # On a CPU, the same graph is traced, but run without a compiler.
    run = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager") if compiled else model

    def forward(tokens_BT: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            logits_BTV = run(tokens_BT[:, :-1])
            return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten().long())

    return _usual(forward, model, optimizer)


def teaching(settings: PretrainConfig, device: torch.device, switches) -> Side:
    """A step of teaching code with the switches of bench.ladder."""
    for kernel in ("flash", "mem_efficient", "cudnn"):
        # Without a fused kernel torch computes the matrix of scores, as code without scaled_dot_product_attention does.
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(switches.flash and kernel == "flash")
    model = GPT(settings.model)
    model.initialise(1)
    model.to(device)
    config = settings.optimizer
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=betas, fused=switches.fused, foreach=not switches.fused
    )
    run = (
        torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
        if switches.compiled
        else model
    )

    def forward(tokens_BT: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=switches.bf16):
            logits_BTV = run(tokens_BT[:, :-1])
            return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten().long())

    return _usual(forward, model, optimizer)


def nanogpt(folder: Path, settings: PretrainConfig, device: torch.device) -> Side:
    """karpathy/nanoGPT with its optimizer and whole-model compilation."""
    module = _load(folder / "nanoGPT" / "model.py")
    model_config = settings.model
    shape = module.GPTConfig(
        block_size=model_config.context,
        vocab_size=model_config.padded_vocab_size,
        n_layer=model_config.layers,
        n_head=model_config.heads,
        n_embd=model_config.width,
        dropout=0.0,
        bias=True,
    )
    model = module.GPT(shape).to(device)
    config = settings.optimizer
    optimizer = model.configure_optimizers(config.weight_decay, config.lr, (config.beta1, config.beta2), device.type)
    run = torch.compile(model) if device.type == "cuda" else model

    def forward(tokens_BT: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return run(tokens_BT[:, :-1], tokens_BT[:, 1:].long().contiguous())[1]

    return _usual(forward, model, optimizer)


def build_nanogpt(folder: Path, settings: PretrainConfig, device: torch.device) -> Side:
    """karpathy/build-nanogpt at its last commit. It does not use torch.compile."""
    # build-nanogpt's evaluation imports packages that a step does not need.
    sys.modules.setdefault("hellaswag", types.SimpleNamespace(render_example=None, iterate_examples=None))
    module = _load(folder / "build-nanogpt" / "train_gpt2.py", before="\n# simple launch:")
    module.master_process = False
    model_config = settings.model
    shape = module.GPTConfig(
        block_size=model_config.context,
        vocab_size=model_config.padded_vocab_size,
        n_layer=model_config.layers,
        n_head=model_config.heads,
        n_embd=model_config.width,
    )
    model = module.GPT(shape).to(device)
    config = settings.optimizer
    optimizer = model.configure_optimizers(config.weight_decay, config.lr, device.type)

    def forward(tokens_BT: torch.Tensor) -> torch.Tensor:
        with autocast(device):
            return model(tokens_BT[:, :-1], tokens_BT[:, 1:].long())[1]

    return _usual(forward, model, optimizer)


def modded(folder: Path, settings: PretrainConfig, device: torch.device) -> Side:
    """KellerJordan/modded-nanogpt's train_gpt_simple.py (track 3): its model, compiled as a whole, with AdamW.

    AdamW replaces Muon here, because only the time of a step is compared. bench.token_efficiency compares optimizers.
    """
    path = folder / "modded-nanogpt" / "records" / "track_3_optimization" / "train_gpt_simple.py"
    module = _load(path, before="########################################\n#                Setup")
    model = module.GPT(settings.model.padded_vocab_size, settings.model.layers, settings.model.width).to(device)
    if device.type == "cuda":
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.optimizer.lr, fused=device.type == "cuda")

    def forward(tokens_BT: torch.Tensor) -> torch.Tensor:
        targets_BT = tokens_BT[:, 1:].long().contiguous()
        return model(tokens_BT[:, :-1], targets_BT) / targets_BT.numel()

    return _usual(forward, model, optimizer)


OTHERS = {"nanoGPT": nanogpt, "build-nanogpt": build_nanogpt, "modded-nanogpt": modded}


def _usual(forward: Callable, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Side:
    def finish() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Side(forward, finish, lambda: optimizer.zero_grad(set_to_none=True), lambda _: contextlib.nullcontext())


def _load(path: Path, before: str | None = None) -> types.ModuleType:
    """Load a module from a file.

    If `before` is given, load only the lines before this text, because the whole script would start a training.
    """
    source = path.read_text()
    if before:
        if before not in source:
            raise SystemExit(f"{path}: has no line {before.strip()!r}; it is not the version that this adapter knows")
        source = source[: source.index(before)]
    module = types.ModuleType(f"rival_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look up their module in sys.modules
    argv, sys.argv = sys.argv, [str(path)]  # some scripts read their own source
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        sys.argv = argv
    return module
