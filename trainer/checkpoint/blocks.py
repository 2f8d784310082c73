"""Cuts tensors into row blocks, assigns the blocks to ranks, and lays them out as a safetensors file in memory.

A block is a range of rows of one parameter, together with the optimizer state of these rows. Each rank owns blocks of
about the same number of bytes. A checkpoint names its blocks ("wte.weight[0:25152]"), so it can be loaded by another
number of ranks than the number that wrote it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch

from core import untrusted

MAX_BLOCK_ELEMENTS = 4 << 20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.uint8: "U8"}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}
_KEY = re.compile(r"^(.+)\[(\d{1,18}):(\d{1,18})\]\Z")


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of the parameter `name`, and the rank that stores them."""

    name: str
    start: int
    stop: int
    owner: int


def assign_blocks(
    shapes: Mapping[str, Sequence[int]],
    world: int,
    max_elements: int = MAX_BLOCK_ELEMENTS,
    rows_of: Mapping[str, int] = MappingProxyType({}),
    together: Iterable[Sequence[tuple[str, int]]] = (),
) -> list[Block]:
    """Cut parameters into blocks of at most `max_elements` elements, and assign the blocks to ranks.

    Blocks are assigned from the largest to the smallest, each to the rank with the fewest elements so far. `rows_of`
    fixes the number of rows per block for some parameters; such blocks may be larger than `max_elements`. `together`
    lists groups of blocks, each block by name and first row. All blocks of a group get the same owner. The result
    depends only on the arguments, so all ranks compute the same result.
    """
    first_of = {each: tuple(sequence[0]) for sequence in together for each in sequence}
    units: dict[tuple[str, int], list[tuple[int, str, int, int]]] = {}
    for name, shape in shapes.items():
        rows, per_row = shape[0], torch.Size(shape[1:]).numel()
        step = rows_of.get(name) or max(1, max_elements // per_row)
        for start in range(0, rows, step):
            unit = units.setdefault(first_of.get((name, start), (name, start)), [])
            unit.append((min(step, rows - start) * per_row, name, start, min(start + step, rows)))
    loads = [0] * world
    blocks = []
    sizes = {unit: sum(elements for elements, *_ in ranges) for unit, ranges in units.items()}
    for unit in sorted(units, key=lambda each: (-sizes[each], each)):
        owner = min(range(world), key=lambda rank: (loads[rank], rank))
        loads[owner] += sizes[unit]
        blocks += [Block(name, start, stop, owner) for _, name, start, stop in units[unit]]
    return sorted(blocks, key=lambda block: (block.owner, block.name, block.start))


def key_of(name: str, start: int, stop: int) -> str:
    return f"{name}[{start}:{stop}]"


def parse_key(key: str) -> tuple[str, int, int]:
    """Split NAME[START:STOP] into (name, start, stop). Raises ValueError for any other text."""
    match = _KEY.match(key)
    if not match:
        raise ValueError(f"{key!r} is not a row block")
    return match.group(1), int(match.group(2)), int(match.group(3))


class StagedFile:
    """A safetensors file in one host buffer, which is allocated once (pinned if the tensors are on a GPU).

    Training waits only for `fill`, which copies into memory that is already allocated.
    """

    def __init__(self, blocks: Iterable[tuple[str, torch.Tensor]]):
        blocks = list(blocks)
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for key, tensor in blocks:
            size = tensor.numel() * tensor.element_size()
            header[key] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # padding, so that the tensors start 8-byte aligned
        start = 8 + len(text)
        on_gpu = any(tensor.is_cuda for _, tensor in blocks)
        if on_gpu:  # a new thread uses GPU 0 by default, and would pin the memory for GPU 0
            torch.cuda.set_device(blocks[0][1].device)
        self._buffer = torch.empty(start + offset, dtype=torch.uint8, pin_memory=on_gpu)
        self._buffer.fill_(0)  # writing zeros allocates the memory pages now, not during the first save
        self._buffer[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self._views = {}
        for key, tensor in blocks:
            first, last = header[key]["data_offsets"]
            self._views[key] = self._buffer[start + first : start + last].view(tensor.dtype).view(tensor.shape)

    @torch.no_grad()
    def fill(self, blocks: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors into the buffer. Keys, shapes and dtypes must be the same as in the constructor."""
        on_gpu = False
        for key, tensor in blocks:
            self._views[key].copy_(tensor, non_blocking=True)
            on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.current_stream().synchronize()

    @property
    def data(self) -> memoryview:
        return memoryview(self._buffer.numpy())


def tensors_of(data: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of the safetensors file `data` (uint8), as views. The safetensors library would copy them twice.

    Raises ValueError if `data` is not a safetensors file.
    """
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or start > len(data):
        raise ValueError("not a safetensors file: its header is longer than the file")
    header = untrusted.parse_json(data[8:start].tobytes())
    if not isinstance(header, dict):
        raise ValueError("not a safetensors file: its header is not a JSON object")
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            dtype, shape = _TYPES[entry["dtype"]], torch.Size(entry["shape"])
            first, last = entry["data_offsets"]
            if not all(type(each) is int and each >= 0 for each in (*entry["shape"], first, last)):
                raise ValueError("a size is negative or missing")
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"not a safetensors file: {key} is described as {repr(entry)[:200]}") from error
        if not 0 <= first <= last <= len(data) - start or shape.numel() * dtype.itemsize != last - first:
            raise ValueError(f"not a safetensors file: {key} is at {first}:{last} of {len(data) - start} bytes")
        flat = torch.frombuffer(data, dtype=dtype, count=shape.numel(), offset=start + first) if shape.numel() else None
        tensors[key] = torch.empty(shape, dtype=dtype) if flat is None else flat.view(shape)
    return tensors
