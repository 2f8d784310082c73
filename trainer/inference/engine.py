"""Text from a model, for many requests at once, each token computed once (KV cache).

    engine = Engine(opened.model, opened.encoding, device)
    for piece in engine.stream([Request(engine.encode("Once upon a time"), Sampling(seed=1))]):
        print(piece.text, end="")

Requests may come and go at any time: `step` either takes in waiting prompts or computes one more token of every text.
What a request gets depends on no other one, up to rounding: matrix products of another number of rows may differ in
the last bits.

Shapes: B rows, T positions, D model width, V vocabulary.
"""

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
from trainer.inference.choose import choose
from trainer.inference.sampling import Sampling
from trainer.inference.text import TextStream
from trainer.model.attention import KVCache, merged
from trainer.model.gpt import GPT
from trainer.model.loss import soft_cap
from trainer.model.precision import autocast, resolve

PROMPT_TOKENS_PER_STEP = 8192  # of padded prompts taken in together
ROOM_STEP = 256  # positions by which a cache grows

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """`tokens` is the prompt. `logprobs`: how many alternatives of each token to tell; none: not even its own.

    `endless` never chooses the end of text (for measuring speed).
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
    """A chosen token, and the likeliest ones; log-probabilities in nats, before any of the sampling's settings."""

    id: int
    data: bytes
    logprob: float | None
    top: tuple[Alternative, ...]


class Piece(NamedTuple):
    """What one step added to the request with this number. The end of text is no token of it."""

    number: int
    text: str
    token: Token | None
    finish: Finish | None


class Completion(NamedTuple):
    text: str
    tokens: tuple[Token, ...]
    finish: Finish


class _Row:
    """One text in the making."""

    def __init__(self, number: int, request: Request, prompt: list[int], context: int):
        self.number = number
        self.request = request
        self.tokens = prompt
        self.seen = set(prompt)
        self.left = min(request.sampling.tokens, context - len(prompt))
        self.random = random.Random(request.sampling.seed)
        self.text = TextStream(request.sampling.stop)


class Engine:
    def __init__(self, model: GPT, encoding, device: torch.device, precision: str = "auto", rows: int = 16):
        """`encoding` may be None where only token ids matter: then pieces have no text."""
        self.model = model
        self.encoding = encoding
        self.device = device
        self.precision = precision
        bf16 = resolve(precision, device) == "bf16"
        self.dtype = torch.bfloat16 if bf16 else model.wte.weight.dtype
        self._most_rows = rows
        self._numbers = itertools.count()
        self._waiting: deque[_Row] = deque()
        self._rows: list[_Row] = []  # in the order of the cache's rows
        self._cache: KVCache | None = None
        self._gone: set[int] = set()

    @property
    def context(self) -> int:
        return self.model.config.context

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding beyond the vocabulary are padding."""
        return min(GPT2_VOCAB_SIZE, self.model.config.padded_vocab_size)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def encode(self, text: str) -> list[int]:
        """A document's beginning as the model saw them in training: after the end of the one before."""
        return [GPT2_END_OF_TEXT, *self.encoding.encode_ordinary(text)]

    def add(self, request: Request) -> int:
        """Queue a request; its number is in its pieces. Raises ConfigError for a prompt that cannot be continued."""
        tokens = list(request.tokens)
        if not tokens:
            raise ConfigError("the prompt has no tokens; give at least the end-of-text token")
        if self.model.config.document_mask and GPT2_END_OF_TEXT in tokens:
            # Such a model never looks beyond the beginning of a document.
            del tokens[: len(tokens) - 1 - tokens[::-1].index(GPT2_END_OF_TEXT)]
        wrong = [token for token in tokens if not 0 <= token < self.vocabulary]
        if wrong:
            raise ConfigError(f"the prompt holds token {wrong[0]}, ids go from 0 to {self.vocabulary - 1}")
        if len(tokens) >= self.context:
            raise ConfigError(
                f"the prompt has {len(tokens)} tokens, the model's context is {self.context}; "
                f"give at most {self.context - 1}"
            )
        row = _Row(next(self._numbers), request, tokens, self.context)
        self._waiting.append(row)
        return row.number

    def cancel(self, number: int) -> None:
        """Give up a request; harmless if it is done."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._gone |= {row.number for row in self._rows if row.number == number}

    @torch.no_grad()
    def step(self) -> list[Piece]:
        """Take in waiting prompts where there is place, else go on with all texts; a piece per text."""
        self._let_go(self._gone)
        self._gone = set()
        if self._waiting and len(self._rows) < self._most_rows:
            rows = self._next_in_line()
            cache, logits_BV = self._read_prompts(rows)
            parts = [(self._cache, range(len(self._rows)))] if self._cache else []
            self._rows += rows
            self._cache = merged([*parts, (cache, range(len(rows)))], self._room()) if parts else cache
        elif self._rows:
            rows = self._rows
            if self._room() > self._cache.room:
                self._cache = merged([(self._cache, range(len(rows)))], self._room())
            tokens_B1 = torch.tensor([row.tokens[-1:] for row in rows], device=self.device)
            with autocast(self.device, self.precision):
                x_BD = self.model.hidden(tokens_B1, self._cache)[:, 0]
            logits_BV = self._logits(x_BD)
        else:
            return []
        pieces = self._extend(rows, logits_BV)
        self._let_go({piece.number for piece in pieces if piece.finish})
        return pieces

    def stream(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """All pieces of these requests, numbered in their order, as they come. Given up, it cancels them."""
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

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """The whole answers, in the order of the requests."""
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

    def _next_in_line(self) -> list[_Row]:
        rows: list[_Row] = []
        longest = 0
        while self._waiting and len(self._rows) + len(rows) < self._most_rows:
            longest = max(longest, len(self._waiting[0].tokens))
            if rows and longest * (len(rows) + 1) > PROMPT_TOKENS_PER_STEP:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _room(self) -> int:
        """Positions that the longest text needs with its next token, rounded up."""
        longest = max(len(row.tokens) for row in self._rows)
        return min(self.context, -(-longest // ROOM_STEP) * ROOM_STEP)

    def _read_prompts(self, rows: Sequence[_Row]) -> tuple[KVCache, torch.Tensor]:
        """A cache with the prompts, padded on the right, and the logits behind each one's end."""
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
        """Choose each row's next token."""
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

    def _let_go(self, numbers: set[int]) -> None:
        kept = [index for index, row in enumerate(self._rows) if row.number not in numbers]
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[index] for index in kept]
        self._cache = merged([(self._cache, kept)], self._room()) if kept else None
