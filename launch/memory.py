"""Would a training config fit the GPUs of a task? The trainer's own estimate, before a machine is rented.

    verdict(settings, "A100", world=8)        (True, "A100: about 17 of 40 GB per GPU, by estimate …"), or None

Only what is above a GPU's memory by the estimate alone is refused; the trainer tries it out on the machine.
"""

from core import fit
from core.gpus import memory_bytes
from core.schema import TrainConfig

UNCONFIRMED = "by estimate, not confirmed on a GPU yet"


def verdict(settings: TrainConfig, gpu: str, world: int) -> tuple[bool, str] | None:
    """Whether `settings` fit, in words with the nearest that do. None if nobody knows the GPU's memory.

    Raises ConfigError if the batch does not divide over `world` ranks.
    """
    memory = memory_bytes(gpu)
    if memory is None:
        return None
    given = settings.batch.micro_batch_size
    sizes = [given] if given else fit.possible(settings, world)  # the trainer looks for the largest that fits
    size = next((each for each in sizes if fit.estimate(settings, each, world) <= memory), sizes[-1])
    need = fit.estimate(settings, size, world)
    if need <= memory:
        found = "" if given else f", with {size} sequences per micro-batch"
        return True, f"{gpu}: about {need / 1e9:.0f} of {memory / 1e9:.0f} GB per GPU, {UNCONFIRMED}{found}"
    needs = f"batch.micro_batch_size = {size} needs about {need / 1e9:.0f} GB per GPU ({UNCONFIRMED})"
    said = f"{gpu}: {needs}, it has {memory / 1e9:.0f}"
    return False, f"{said}; {fit.advice(settings, world, memory)}"
