"""Would a training config fit into a GPU? An estimate, to refuse before a machine is rented what cannot work.

    problem(settings, "A100")        a sentence, or None

Per parameter 16 bytes: fp32 weights, gradients and two AdamW moments. Per token and layer 34 x width bytes of
activations in bf16 (Korthikanti et al. 2022, equation 2, without the attention scores that flash attention does not
keep). One chunk of the output layer's logits in fp32 and bf16 (trainer/model/loss.py). torch.compile saves some of
this, the allocator wastes some: refused is only what is over by the estimate alone.
"""

from core.schema import TrainConfig
from costs.forecast import parameters

# GB as NVIDIA's data sheets give them (10^9 bytes); the driver keeps a little.
GPU_GB = {"A100": 40, "A100-80GB": 80, "H100": 80, "H200": 141, "GH200": 96, "A10": 24, "A10G": 24, "L4": 24}
BYTES_PER_PARAMETER = 16
BYTES_PER_ACTIVATION = 34
CHUNK_ROWS = 4096  # as in trainer/model/loss.py


def needed_bytes(settings: TrainConfig) -> int:
    model = settings.model
    tokens = settings.batch.micro_batch * model.context
    activations = tokens * model.width * (BYTES_PER_ACTIVATION * model.layers + 8)
    logits = min(tokens, CHUNK_ROWS) * model.vocab_rows * 6
    return parameters(settings) * BYTES_PER_PARAMETER + activations + logits


def problem(settings: TrainConfig, gpu: str) -> str | None:
    """Why `settings` cannot run on this GPU, with a micro-batch that could. None if it can, or nobody knows the GPU."""
    have = GPU_GB.get(gpu, 0) * 10**9
    need = needed_bytes(settings)
    if not have or need <= have:
        return None
    at_rest = parameters(settings) * BYTES_PER_PARAMETER
    fitting = int(settings.batch.micro_batch * max(0.0, (have - at_rest) / (need - at_rest)))
    smaller = 1 << (fitting.bit_length() - 1) if fitting else 0
    cure = f"try --batch.micro_batch={smaller}" if smaller else "choose a larger GPU or a smaller model"
    return (
        f"batch.micro_batch = {settings.batch.micro_batch} needs about {need / 1e9:.0f} GB, "
        f"a {gpu} has {GPU_GB[gpu]}; {cure}"
    )
