"""Switches off single optimizations of the training step, so that the gain of each can be measured.

    python -m bench.gpu.steps --without=late-reads,batches ...

Each function switches off one optimization: it replaces a part of the trainer in this process by a simpler part with
the same result up to rounding. Only these functions import torch, so that a program can list the names without torch.
"""

from collections.abc import Callable, Mapping


def _late_reads() -> None:
    """Wait for each step before the next one is launched."""
    from trainer.loop.loop import Loop

    step = Loop._step

    def waiting(loop: Loop, *arguments) -> None:
        step(loop, *arguments)
        loop._read()

    Loop._step = waiting


def _batches() -> None:
    """Update Muon's matrices one by one."""
    from trainer.optim import muon

    muon.BATCHES = 1 << 30


def _compiled_muon() -> None:
    from trainer.optim import muon

    muon.COMPILES = False


def _float32_sums() -> None:
    """Round the product of each chunk before it is added to the gradient of the output layer."""
    from trainer.model import loss

    loss.SUM_IN_FLOAT32 = False


def _share() -> None:
    """Scale the gradients of the loss in a separate pass."""
    from trainer.model import gpt, loss

    plain = gpt.chunked_cross_entropy

    def scaled(x_ND, weight_VD, targets_N, softcap=0.0, fused=False, share=None):
        found = plain(x_ND, weight_VD, targets_N, softcap, fused)
        return found if share is None else loss.with_share(found, share)

    gpt.chunked_cross_entropy = scaled


def _zeroed_lists() -> None:
    """Zero the gradients one by one."""
    from trainer.optim.reduce import TreeReducer

    reset = TreeReducer.reset

    def one_by_one(reducer: TreeReducer) -> None:
        kept, reducer.parameters = reducer.parameters, []
        reset(reducer)
        reducer.parameters = kept
        reducer.model.zero_grad(set_to_none=False)

    TreeReducer.reset = one_by_one


TOGGLES: Mapping[str, Callable[[], None]] = {
    "late-reads": _late_reads,
    "batches": _batches,
    "compiled-muon": _compiled_muon,
    "float32-sums": _float32_sums,
    "share": _share,
    "zeroed-lists": _zeroed_lists,
}


def undo(names: str) -> None:
    """Switch off the optimizations in `names`, which are separated by commas. Raises SystemExit for an unknown name."""
    for name in filter(None, names.split(",")):
        if name not in TOGGLES:
            raise SystemExit(
                f"--without={name}: not an optimization that can be switched off; choose from {', '.join(TOGGLES)}"
            )
        TOGGLES[name]()
