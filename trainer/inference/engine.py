"""Generates the texts of many requests in one batch, with a KV cache.

    engine = Engine(trained.model, trained.encoding, device)
    for piece in engine.stream([GenerationRequest(engine.encode("Once upon a time"), Sampling(seed=1))]):
        print(piece.text, end="")

Requests may be added and cancelled at any time. Each `step` either processes waiting prompts or computes the next token
of every text. Results do not depend on the other requests, except for rounding: matrix products of another batch size
may differ in the last bits.

Shapes: B rows, T positions, D model width, V vocabulary.
"""

import codecs
import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from core.data.vocabulary import GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE
from core.errors import ConfigError
from core.settings.inference import Sampling
from trainer.inference.choose import choose
from trainer.model.attention import KVCache, merged
from trainer.model.gpt import GPT
from trainer.model.loss import soft_cap
from trainer.model.precision import autocast, resolve

PROMPT_TOKENS_PER_STEP = 8192  # largest number of prompt tokens in one batch, with padding
ROOM_STEP = 256  # a cache grows by this number of positions

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationRequest:
    """`tokens` is the prompt. `logprobs` is the number of alternatives to report per token.

    If `logprobs` is None, tokens have no log-probability. `endless` excludes the end-of-text token, to measure speed.
    """

    tokens: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: int | None = None
    endless: bool = False


class Alternative(NamedTuple):
    id: int
    data: bytes
    logprob: float


class Token(NamedTuple):
    """A chosen token, and the likeliest tokens (`top`). Log-probabilities (nats) do not depend on sampling settings."""

    id: int
    data: bytes
    logprob: float | None
    top: tuple[Alternative, ...]


class Piece(NamedTuple):
    """Output of one step for one request. `token` is None if the model chose the end-of-text token."""

    number: int
    text: str
    token: Token | None
    finish: Finish | None


class Completion(NamedTuple):
    text: str
    tokens: tuple[Token, ...]
    finish: Finish


class _Row:
    """One text in progress."""

    def __init__(self, number: int, request: GenerationRequest, prompt: list[int], context: int):
        self.number = number
        self.request = request
        self.tokens = prompt
        self.seen = set(prompt)
        self.left = min(request.sampling.max_tokens, context - len(prompt))
        self.random = random.Random(request.sampling.seed)
        self.text = TextStream(request.sampling.stop)


class Engine:
    """Batches requests to one model. Not thread-safe."""

    def __init__(
        self,
        model: GPT,
        encoding,
        device: torch.device,
        precision: str = "auto",
        max_batch_size: int = 16,
        caches: bool = True,
    ):
        """If `encoding` is None, pieces have token ids but no text.

        If `caches` is false, each step computes the keys and values of all tokens anew, to show how much the cache
        saves.
        """
        self.model = model
        self.encoding = encoding
        self.device = device
        self.precision = precision
        bf16 = resolve(precision, device) == "bf16"
        self.dtype = torch.bfloat16 if bf16 else model.wte.weight.dtype
        self._max_batch_size = max_batch_size
        self._caches = caches
        self._numbers = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # texts in progress, in the order of the rows of the cache
        self._cache: KVCache | None = None
        self._gone: set[int] = set()

    @property
    def context(self) -> int:
        return self.model.config.context

    @property
    def vocabulary(self) -> int:
        """The number of tokens of the vocabulary. Further rows of the embedding are padding."""
        return min(GPT2_VOCAB_SIZE, self.model.config.padded_vocab_size)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after an end-of-text token as at the start of each document in training."""
        return [GPT2_END_OF_TEXT, *self.encoding.encode_ordinary(text)]

    def add(self, request: GenerationRequest) -> int:
        """Queues a request and returns the number that its pieces carry. Raises ConfigError for an invalid prompt."""
        tokens = list(request.tokens)
        if not tokens:
            raise ConfigError("the prompt has no tokens; give at least the end-of-text token")
        if self.model.config.document_mask and GPT2_END_OF_TEXT in tokens:
            # A model with a document mask attends to the current document only, so earlier documents are dropped.
            del tokens[: len(tokens) - 1 - tokens[::-1].index(GPT2_END_OF_TEXT)]
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong:
            raise ConfigError(f"the prompt contains token {wrong[0]}, ids go from 0 to {self.vocabulary - 1}")
        if len(tokens) >= self.context:
            raise ConfigError(
                f"the prompt has {len(tokens)} tokens, the model's context is {self.context}; "
                f"give at most {self.context - 1}"
            )
        row = _Row(next(self._numbers), request, tokens, self.context)
        self._waiting.append(row)
        return row.number

    def cancel(self, number: int) -> None:
        """Cancels a request. Does nothing if the request is already complete."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._gone |= {row.number for row in self._rows if row.number == number}

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Processes waiting prompts if the batch has room. Otherwise extends all texts by a token.

        Returns one piece for each text that was processed or extended.
        """
        self._drop(self._gone)
        self._gone = set()
        if self._waiting and len(self._rows) < self._max_batch_size:
            rows = self._next_prompts()
            cache, logits_BV = self._read_prompts(rows)
            parts = [(self._cache, range(len(self._rows)))] if self._cache else []
            self._rows += rows
            self._cache = merged([*parts, (cache, range(len(rows)))], self._room()) if parts else cache
        elif self._rows:
            rows = self._rows
            if not self._caches:
                self._cache, logits_BV = self._read_prompts(rows)
                return self._finished(rows, logits_BV)
            if self._room() > self._cache.room:
                self._cache = merged([(self._cache, range(len(rows)))], self._room())
            tokens_B1 = torch.tensor([row.tokens[-1:] for row in rows], device=self.device)
            with autocast(self.device, self.precision):
                x_BD = self.model.hidden(tokens_B1, self._cache)[:, 0]
            logits_BV = self._logits(x_BD)
        else:
            return []
        return self._finished(rows, logits_BV)

    def _finished(self, rows: Sequence[_Row], logits_BV: torch.Tensor) -> list[Piece]:
        """Returns the pieces of a step, and removes complete texts from the batch."""
        pieces = self._extend(rows, logits_BV)
        self._drop({piece.number for piece in pieces if piece.finish})
        return pieces

    def stream(self, requests: Sequence[GenerationRequest]) -> Iterator[Piece]:
        """Yields the pieces of these requests, numbered by position. Closing the iterator cancels the requests."""
        order = {self.add(request): place for place, request in enumerate(requests)}
        open_numbers = set(order)
        try:
            while open_numbers:
                for piece in self.step():
                    if piece.finish:
                        open_numbers.discard(piece.number)
                    yield piece._replace(number=order[piece.number])
        finally:
            for number in open_numbers:
                self.cancel(number)

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        """Generates complete texts, in the order of the requests."""
        texts: list[list[str]] = [[] for _ in requests]
        tokens: list[list[Token]] = [[] for _ in requests]
        finishes: list[Finish] = ["length"] * len(requests)
        for piece in self.stream(requests):
            texts[piece.number].append(piece.text)
            if piece.token:
                tokens[piece.number].append(piece.token)
            if piece.finish:
                finishes[piece.number] = piece.finish
        return [
            Completion("".join(text), tuple(found), finish)
            for text, found, finish in zip(texts, tokens, finishes, strict=True)
        ]

    def _next_prompts(self) -> list[_Row]:
        rows: list[_Row] = []
        longest = 0
        while self._waiting and len(self._rows) + len(rows) < self._max_batch_size:
            longest = max(longest, len(self._waiting[0].tokens))
            if rows and longest * (len(rows) + 1) > PROMPT_TOKENS_PER_STEP:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _room(self) -> int:
        """Positions that the longest text needs, rounded up."""
        longest = max(len(row.tokens) for row in self._rows)
        return min(self.context, -(-longest // ROOM_STEP) * ROOM_STEP)

    def _read_prompts(self, rows: Sequence[_Row]) -> tuple[KVCache, torch.Tensor]:
        """Fills a new cache with the prompts. Returns the cache, and the logits (B, V) after each prompt."""
        lengths = [len(row.tokens) for row in rows]
        tokens_BT = torch.zeros(len(rows), max(lengths), dtype=torch.long)
        for index, row in enumerate(rows):
            tokens_BT[index, : lengths[index]] = torch.tensor(row.tokens)
        room = min(self.context, -(-max(lengths) // ROOM_STEP) * ROOM_STEP)
        cache = KVCache(self.model.config, len(rows), room, self.device, self.dtype)
        lengths_B = torch.tensor(lengths, device=self.device)
        with autocast(self.device, self.precision):
            x_BTD = self.model.hidden(tokens_BT.to(self.device), cache)
        cache.set_lengths(lengths_B)
        return cache, self._logits(x_BTD[torch.arange(len(rows), device=self.device), lengths_B - 1])

    def _logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            logits_BV = F.linear(x_BD, self.model.head)[:, : self.vocabulary]
        return soft_cap(logits_BV.float(), self.model.config.logit_softcap)

    def _extend(self, rows: Sequence[_Row], logits_BV: torch.Tensor) -> list[Piece]:
        """Chooses the next token of each row."""
        wanted = [index for index, row in enumerate(rows) if row.request.logprobs is not None]
        logprobs = dict(zip(wanted, logits_BV[wanted].log_softmax(1), strict=True)) if wanted else {}
        for index, row in enumerate(rows):
            if row.request.endless:
                logits_BV[index, GPT2_END_OF_TEXT:] = torch.finfo(torch.float32).min
        samplings = [row.request.sampling for row in rows]
        ids = choose(logits_BV, samplings, [row.random.random() for row in rows], [row.seen for row in rows])
        return [
            self._piece(row, id, logprobs.get(index)) for index, (row, id) in enumerate(zip(rows, ids, strict=True))
        ]

    def _piece(self, row: _Row, id: int, logprobs_V: torch.Tensor | None) -> Piece:
        if id == GPT2_END_OF_TEXT:
            return Piece(row.number, row.text.feed(b"", final=True)[0], None, "stop")
        data = self._bytes_of(id)
        token = Token(id, data, None, ())
        if logprobs_V is not None:
            values, ids = logprobs_V.topk(row.request.logprobs)
            pairs = zip(ids.tolist(), values.tolist(), strict=True)
            top = tuple(Alternative(other, self._bytes_of(other), value) for other, value in pairs)
            token = Token(id, data, logprobs_V[id].item(), top)
        row.tokens.append(id)
        row.seen.add(id)
        row.left -= 1
        text, stopped = row.text.feed(data, final=not row.left)
        return Piece(row.number, text, token, "stop" if stopped else None if row.left else "length")

    def _bytes_of(self, id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(id) if self.encoding else b""

    def _drop(self, numbers: set[int]) -> None:
        kept = [index for index, row in enumerate(self._rows) if row.number not in numbers]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        self._cache = merged([(self._cache, kept)], self._room()) if kept else None


class TextStream:
    """Decodes a text token by token. Holds back incomplete characters and possible beginnings of a stop text."""

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes, final: bool = False) -> tuple[str, bool]:
        """Takes a token's bytes. Returns the text that can be shown, and whether it ended at a stop text.

        The stop text and all that follows are omitted. If `final` is true, no text is held back.
        """
        self._held += self._decoder.decode(data, final)
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        keep = 0 if final else self._partial_stop()
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False

    def _partial_stop(self) -> int:
        """Length of the longest suffix of the held text that is the beginning of a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
