"""Counts the operations, bytes and waits of the host in a training step, without a GPU.

    python -m bench.step_counts [--before=../old] [--only=gpt2-124m-1] [--width=96] [--out=FILE]

It takes steps of the trainer's loop on a CPU, with short sequences, under a TorchDispatchMode. The counts of operations
equal those of the preset. Bytes depend on the width, and the bytes of the passes also on the number of tokens.

    operations   calls of kernels, without views and allocations; an operation over a list of tensors counts once
    moved        the sizes of all tensors that operations read and write
    reads        the places where the host reads a value of a tensor; on a GPU, the host would wait there
    late         the reads of values of the previous step, which has ended by then

Eight ranks are one process whose collectives move nothing. The numbers are those of the last rank. It owns no rows of
the embeddings, so it gets more of Muon's matrices than other ranks. `--before` names a checkout of another commit.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from bench import harness
from core.settings import loader
from core.settings.training import PretrainConfig

CASES = [(preset, world) for preset in ("gpt2-124m", "speedrun-162m") for world in (1, 8)]
SEQUENCES, CONTEXT, ACCUMULATION = 1, 64, 2
WARM_UP = 2
_RESULT = "counted: "


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--before", type=Path, help="folder with another checkout; also count its operations")
    parser.add_argument(
        "--only",
        default="",
        help="measure only these presets and numbers of ranks, such as gpt2-124m-8; separated by commas",
    )
    parser.add_argument("--width", type=int, default=0, help="model dimension; default: the preset's")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [f"{preset}-{world}" for preset, world in CASES]
    if options.one:
        for name in options.one.split(","):
            preset, _, world = name.rpartition("-")
            print(_RESULT + json.dumps(count(preset, int(world), options.width)), flush=True)
        return
    chosen = options.only.split(",") if options.only else names
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"--only={unknown[0]}: not a case; choose from {', '.join(names)}")
    trees = {"before": options.before.resolve()} if options.before else {}
    trees["after"] = harness.REPOSITORY
    found = {side: _counted(tree, chosen, options.width) for side, tree in trees.items()}
    cases = {name: {side: found[side][number] for side in trees} for number, name in enumerate(chosen)}
    commits = {side: _commit(tree) for side, tree in trees.items()}
    about = {"sequences": SEQUENCES, "context": CONTEXT, "accumulation": ACCUMULATION, "width": options.width or None}
    results = harness.header("torch", "numpy") | {"load": os.getloadavg()[0], "commits": commits, **about}
    harness.finish(results | {"cases": cases}, show, options.out)


def _counted(tree: Path, names: list[str], width: int) -> list[dict[str, Any]]:
    """The counts of a working tree. This file is run with the packages of that tree."""
    flags = ["step_counts", f"--one={','.join(names)}", f"--width={width}"]
    code = f"import runpy, sys; sys.path.insert(0, {str(tree)!r}); sys.argv = {flags!r}; "
    code += f"runpy.run_path({str(Path(__file__).resolve())!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if len(found) < len(names):
        raise SystemExit(f"{tree}, {names[len(found)]}: the count failed:\n{done.stderr[-3000:]}")
    return [json.loads(line.removeprefix(_RESULT)) for line in found]


def _commit(tree: Path) -> str:
    describe = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip()


def show(results: dict[str, Any]) -> None:
    heads = ["case", "", "operations", "of the optimizer", "allocations", "allocated", "moved", "reads"]
    heads += ["of the optimizer", "late", "device gathers", "host gathers"]
    rows = []
    for name, sides in results["cases"].items():
        for side, each in sides.items():
            row = [name, side, each["operations"], each["optimizer_operations"], each["allocations"]]
            row += [f"{each['allocated_bytes'] / 1e6:.0f} MB", f"{each['moved_bytes'] / 1e9:.2f} GB"]
            row += [
                each["reads"],
                each["optimizer_reads"],
                each["late_reads"],
                each["gathers_in_step"],
                each["gathers_between_steps"],
            ]
            rows.append([str(value) for value in row])
    width = f"width {results['width']}" if results["width"] else "the preset's width"
    about = f"torch {results['versions']['torch']}, {results['date']}, {results['machine']['cores']} cores"
    harness.print_table(
        f"One step, {SEQUENCES} x {CONTEXT} x {ACCUMULATION} tokens, {width}; {about}",
        heads,
        rows,
    )


# --- one case, in a separate process ---------------------------------------------------------------------------


def count(preset: str, world: int, width: int = 0) -> dict[str, Any]:
    from bench.gpu import presets

    tokens = SEQUENCES * ACCUMULATION * CONTEXT * world
    flags = [f"--model.context={CONTEXT}", f"--batch.micro_batch_size={SEQUENCES}"]
    flags += [f"--batch.tokens_per_step={tokens}", "--train.norms_every=0"]
    flags += [f"--model.width={width}"] if width else []
    return count_steps(presets.settings_of(preset, *flags), world)


def count_steps(settings: PretrainConfig, world: int) -> dict[str, Any]:
    """Counts of one step of the trainer's loop, after WARM_UP other steps."""
    import torch

    torch.set_num_threads(1)
    with fake_ranks(world) as ranks:
        loop = make_loop(settings, ranks)
        shape = (settings.batch.micro_batch_size, settings.model.context + 1)
        batches = [torch.randint(0, 50000, shape, dtype=torch.int32) for _ in range(loop.accumulation)]
        for step in range(1, WARM_UP + 1):
            take_step(loop, step, batches)
        seen = _counter()
        with seen.watch(loop):
            take_step(loop, WARM_UP + 1, batches)
            gathers = seen.gathers
            loop._exchange(WARM_UP + 1, batches)
    return {
        "operations": seen.operations,
        "optimizer_operations": seen.of_optimizer,
        "allocations": seen.allocations,
        "allocated_bytes": seen.allocated,
        "moved_bytes": seen.moved,
        "reads": seen.reads["launch"],
        "optimizer_reads": seen.reads["optimizer"],
        "late_reads": int(bool(seen.reads["late"])),  # all after one wait
        "gathers_in_step": gathers,
        "gathers_between_steps": seen.gathers - gathers,
        "parameters": len(list(loop.model.parameters())),
        "most_frequent": dict(sorted(seen.by_name.items(), key=lambda each: -each[1])[:12]),
    }


def take_step(loop: Any, step: int, batches: list) -> None:
    import inspect

    from trainer.loop import health

    # In older trees, the host waits for each step and measures the seconds itself.
    takes_seconds = "waited_seconds" in inspect.signature(loop._step).parameters
    waited: Any = 0.0
    if not takes_seconds:
        waited = health.DeviceClock(loop.ranks.device)
        with waited:
            pass
    loop._step(step, batches, waited)


@contextlib.contextmanager
def fake_ranks(world: int):
    """Within this context, the process is the last rank of `world`.

    Collectives move nothing, as if all ranks had the same values.
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from torch.utils._python_dispatch import _disable_current_modes

    from trainer.distributed.process_group import Ranks

    def all_to_all(received: torch.Tensor, sent: torch.Tensor, **_: Any) -> None:
        with _disable_current_modes():
            received.copy_(sent)

    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=world - 1, world_size=world)
    original, dist.all_to_all_single = dist.all_to_all_single, all_to_all
    try:
        yield Ranks(world - 1, world, world - 1, world, torch.device("cpu"), store, dist.group.WORLD)
    finally:
        dist.all_to_all_single = original
        dist.destroy_process_group()


def make_loop(settings: PretrainConfig, ranks: Any) -> Any:
    """The trainer's loop without a run. It stores nothing, and no request arrives."""
    from core.run.segment import SegmentLog
    from trainer.loop.loop import Loop
    from trainer.model.gpt import GPT
    from trainer.optim.optimizer import BlockOptimizer
    from trainer.optim.schedule import Schedule
    from trainer.stages.pretrain import Pretrain

    def never(*_: Any, **__: Any) -> bool:
        return False

    model = GPT(settings.model)
    model.initialise(1)
    micro_batches = settings.batch.tokens_per_step // (settings.batch.micro_batch_size * settings.model.context)
    accumulation = micro_batches // ranks.world
    stage = SimpleNamespace(
        settings=settings,
        accumulation=accumulation,
        precision="fp32",
        round_robin=False,
        schedule=Schedule(settings.optimizer, settings.train.steps),
        steps=settings.train.steps,
        identity=loader.identity(settings),
        objective=lambda *arguments: Pretrain.objective(None, *arguments),
    )
    saver = SimpleNamespace(taken_over=None, stuck=None, busy=False, last_step=0, seconds=lambda: 0.0, failure=None)
    saver.failing_seconds = lambda: 0.0
    saver.cadence, saver.wait = SimpleNamespace(due=never), never
    return Loop(
        stage=stage,
        ranks=ranks,
        model=model,
        optimizer=BlockOptimizer(model, settings.optimizer, ranks.rank, ranks.world),
        batches=SimpleNamespace(numbers=list(range(accumulation))),
        saver=saver,
        segment=SegmentLog(cap=SimpleNamespace(reached=never)),
        requests=SimpleNamespace(stop=None, take_save=never),
        evaluator=SimpleNamespace(),
        reporter=SimpleNamespace(step=never, metric=never),
        annealer=SimpleNamespace(decide=lambda step: None, failure=None),
    )


def _counter() -> Any:
    """A counter of operations. Its classes are defined here, because only functions of this module import torch."""
    from collections import Counter

    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from trainer.loop import loop as loops

    reading = {getattr(torch.Tensor, name) for name in ("cpu", "item", "tolist", "numpy", "nonzero", "is_nonzero")}
    reading |= {getattr(torch.Tensor, name) for name in ("__float__", "__int__", "__bool__", "__index__")}
    no_kernel = {"empty", "empty_like", "new_empty", "empty_strided", "detach", "alias", "lift_fresh", "_unsafe_view"}
    no_kernel |= {"_local_scalar_dense", "_record_function_enter_new", "_record_function_exit"}

    class Operations(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operations = self.of_optimizer = self.allocations = self.allocated = self.moved = self.gathers = 0
            self.by_name: Counter = Counter()
            self.reads: Counter = Counter()
            self.where = "launch"
            self.in_optimizer = False

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            results = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            given, made = _tensors([args, kwargs or {}]), _tensors(results)
            if function.namespace == "c10d":
                self.gathers += "allgather" in name
                return results
            known = {each.untyped_storage()._cdata for each in given}
            new = {each.untyped_storage()._cdata: each for each in made if each.untyped_storage()._cdata not in known}
            self.allocations += len(new)
            self.allocated += sum(each.untyped_storage().nbytes() for each in new.values())
            if function.is_view or name in no_kernel:
                return results
            self.operations += 1
            self.of_optimizer += self.in_optimizer
            self.by_name[name] += 1
            self.moved += sum(each.numel() * each.element_size() for each in [*given, *made])
            return results

        @contextlib.contextmanager
        def watch(self, loop):
            """Count within the block."""
            optimize, report = loop.optimizer.step, getattr(loop, "_report", None)

            def optimizing(*arguments):
                self.in_optimizer, self.where = True, "optimizer"
                optimize(*arguments)
                self.in_optimizer, self.where = False, "launch"

            def reporting(*arguments):
                self.where = "late"
                report(*arguments)
                self.where = "launch"

            def gathering(*arguments):
                found = gather(*arguments)
                found.is_on_host = True
                return found

            loop.optimizer.step = optimizing
            if report:
                loop._report = reporting
            gather = loops.gather_numbers
            with mock.patch.object(loops, "gather_numbers", gathering), Reads(self), self:
                yield

    class Reads(TorchFunctionMode):
        def __init__(self, counts: Operations):
            super().__init__()
            self._counts = counts

        def __torch_function__(self, function, types, args=(), kwargs=None):
            on_host = any(getattr(each, "is_on_host", False) for each in _tensors([args, kwargs or {}]))
            if function in reading and not on_host:
                self._counts.reads[self._counts.where] += 1
            results = function(*args, **(kwargs or {}))
            if function is torch.Tensor.cpu:
                results = results.clone()
            # A tensor that is computed only from values on the host is on the host too.
            if on_host or function is torch.Tensor.cpu:
                for each in _tensors([results]):
                    each.is_on_host = True
            return results

    return Operations()


def _tensors(values: Any) -> list:
    import torch

    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [each for value in values for each in _tensors(value)] if isinstance(values, list | tuple) else []


if __name__ == "__main__":
    main()
