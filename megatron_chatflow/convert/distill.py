"""Fits the rows of new tokens to a small text, with every other weight of the model frozen.

The teacher is the model on the text in the old tokens, the student the same model on the same text
in the new tokens. The rows of the new tokens are the only parameters. They minimize the student's
next-token loss plus the distance between the student's and the teacher's last hidden states, at the
positions at which tokens of both end at the same byte. The distance is that of Token Distillation
(Dobler et al., arXiv 2505.20133); it shows a new token which meaning it has. The next-token loss
lowers the probability of new tokens where they are not wanted and raises it where they are, which a
distance of states alone does not. With tied embeddings both losses act on the same rows.

A small text shows most tokens only a few times. What all new rows have in common is therefore
fitted first: a map from the old rows of a token's pieces to its row (`_Map`), which every token of
the text improves and which serves tokens that do not occur in it as well. Then each row is fitted
on its own too.

Every tenth document is held out. The rows of the best epoch on these documents are kept, or the
initial rows if no epoch is better.

The model is transformers' and is in memory as a whole, on a GPU if there is one.
"""

import heapq
import logging
import math
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from megatron_chatflow.convert.shape import LlamaShape, huggingface_config
from megatron_chatflow.convert.vocabulary import Resize, VocabularyGrowth, grow_rows
from megatron_chatflow.errors import UserError
from megatron_chatflow.runtime.device import has_fast_bf16
from megatron_chatflow.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
WINDOW = 256  # tokens of a document that are used
STEP_TOKENS = 256  # maximum number of tokens of a step
MIN_STEPS = 64  # number of steps of an epoch that smaller steps are used for
MAX_EPOCHS = 2
ROWS_BEGIN = 0.4  # part of the steps after which each row is fitted on its own
# Largest steps of Adam: of a value of an input row, relative to the root mean square of the old
# rows, and of a logit, which an output row may change by the step times the state's absolute sum.
INPUT_STEP = 0.05
LOGIT_STEP = 0.5
# The same of the map: of a value of its constant, relative to the root mean square of the old
# rows, of a weight of the first and the last piece, and of a value of its matrix.
CONSTANT_STEP = 0.02
PIECE_STEP = 0.02
MATRIX_STEP = 5e-4
STATE_WEIGHT = 1.0  # weight of the distance of states
HELD_OUT_EVERY = 10
_CHUNK_LOGITS = 1 << 25  # logits held at a time
_CANDIDATE_CHARACTERS = 64  # characters of candidate documents for each token


@dataclass(frozen=True)
class Scores:
    """The model on held-out documents.

    Attributes:
        bits_per_byte: Next-token loss of the student.
        distance: Mean squared distance between student's and teacher's last hidden states, relative
            to the mean square of the teacher's.
    """

    bits_per_byte: float
    distance: float


@dataclass(frozen=True)
class Distilled:
    """Fitted rows.

    Attributes:
        rows: float32[new tokens, hidden] by Hugging Face's name of the tensor.
        num_tokens: Tokens of the text that were used, held-out ones included.
        num_fitted: New tokens that occur in the text; the rows of the others are only mapped.
        before: Scores of the initial rows.
        after: Scores of the fitted rows.
        seconds: Time of the fit.
    """

    rows: Mapping[str, torch.Tensor]
    num_tokens: int
    num_fitted: int
    before: Scores
    after: Scores
    seconds: float

    def __str__(self) -> str:
        """Returns a summary in one line."""
        num_new = len(next(iter(self.rows.values())))
        unseen = num_new - self.num_fitted
        return (
            f"fitted {self.num_fitted} of {num_new} new tokens to {self.num_tokens:,} tokens of "
            f"text in {self.seconds:.0f} s: held-out bits per byte {self.before.bits_per_byte:.3f} "
            f"-> {self.after.bits_per_byte:.3f}, distance of states {self.before.distance:.3f} -> "
            f"{self.after.distance:.3f}"
            + (f"; {unseen} do not occur in the text and are only mapped" if unseen else "")
        )


@dataclass(frozen=True)
class _Window:
    """The beginning of a document in both vocabularies.

    Attributes:
        student: Ids of the new tokenizer.
        teacher: Ids of the old tokenizer.
        matches: For each id of the student, the place of the teacher's id that ends at the same
            byte, or -1.
        num_bytes: Bytes of the student's ids but the first.
    """

    student: list[int]
    teacher: list[int]
    matches: list[int]
    num_bytes: int


def distill(
    weights: Mapping[str, torch.Tensor],
    shape: LlamaShape,
    old: Tokenizer,
    growth: VocabularyGrowth,
    resize: Resize,
) -> Distilled:
    """Fits the rows of the new tokens.

    Args:
        weights: All tensors of the model by Hugging Face's names.
        shape: The model's shape before it grows.
        old: The tokenizer of the model.
        growth: The new tokens.
        resize: The new tokenizer, the text and the seed.

    Raises:
        UserError: There is too little text, or no new token occurs in it, or transformers is not
            installed.
    """
    begin = time.monotonic()
    windows = _windows(old, resize, shape.longest)
    fitted = sorted({i - growth.num_old for w in windows for i in w.student if i >= growth.num_old})
    if not fitted:
        raise UserError(
            f"--distill-text: no new token of {resize.tokenizer.model_path} occurs in it; give "
            "text in the new language"
        )
    held_out = windows[::HELD_OUT_EVERY]
    training = [w for k, w in enumerate(windows) if k % HELD_OUT_EVERY]
    if not training:
        raise UserError(
            "--distill-text: has only one document of at least two tokens; give more text"
        )
    student = _Student(weights, shape, growth, fitted)
    before = best = student.score(held_out)
    logger.info("mean-of-pieces: %.3f bits per byte of held-out text", before.bits_per_byte)
    kept = student.rows()
    groups = student.parameter_groups()
    optimizer = torch.optim.Adam(groups, lr=1.0, betas=(0.9, 0.98))
    generator = random.Random(resize.seed)
    num_tokens = sum(len(w.student) for w in windows)
    step_tokens = min(STEP_TOKENS, num_tokens // MIN_STEPS)
    epochs = [_batches(training, step_tokens, generator) for _ in range(MAX_EPOCHS)]
    num_steps, step = sum(map(len, epochs)), 0
    bar = tqdm(total=num_steps, unit="step", desc="distill", disable=None)
    for number, batches in enumerate(epochs, start=1):
        for batch in batches:
            step += 1
            warmup = min(1.0, step / max(1, num_steps // 20))
            for group in optimizer.param_groups:
                has_begun = step > group["begin"] * num_steps
                group["lr"] = group["step"] * warmup * (1 - (step - 1) / num_steps) * has_begun
            optimizer.zero_grad()
            torch.autograd.backward(student.loss(batch))
            optimizer.step()
            bar.update()
        scores = student.score(held_out)
        logger.info("epoch %d: %.3f bits per byte of held-out text", number, scores.bits_per_byte)
        if not math.isfinite(scores.bits_per_byte):
            break
        if scores.bits_per_byte < best.bits_per_byte:
            best, kept = scores, student.rows()
    bar.close()
    return Distilled(
        rows=kept,
        num_tokens=num_tokens,
        num_fitted=len(fitted),
        before=before,
        after=best,
        seconds=time.monotonic() - begin,
    )


def with_fitted_rows(
    weights: Mapping[str, torch.Tensor],
    shape: LlamaShape,
    old: Tokenizer,
    growth: VocabularyGrowth,
    resize: Resize,
) -> Resize:
    """Fits the rows, see `distill`, logs the result, and returns the resize with these rows."""
    done = distill(weights, shape, old, growth, resize)
    logger.info("%s", done)
    return replace(resize, rows=done.rows)


def _windows(old: Tokenizer, resize: Resize, longest: int) -> list[_Window]:
    """Encodes documents in random order until they have the requested number of tokens."""
    windows, num_tokens = [], 0
    num_characters = _CANDIDATE_CHARACTERS * resize.distill_tokens
    texts = _shuffled(resize.distill_text, num_characters, resize.seed)
    for text in texts:
        room = min(WINDOW, longest - 1, resize.distill_tokens - num_tokens)
        if room < 2:
            break
        window = _window(old, resize.tokenizer, text, room, longest)
        if window is not None:
            windows.append(window)
            num_tokens += len(window.student)
    return windows


def _shuffled(texts: Iterable[str], max_characters: int, seed: int) -> list[str]:
    """Returns random documents in random order, the first of a shuffle of all of them.

    Memory is bounded: documents after the first ``max_characters`` of the shuffle are dropped.
    """
    generator = random.Random(seed)
    heap: list[tuple[float, str]] = []
    num_characters = 0
    for text in texts:
        # Negative, so that the document that would come last is the first to be dropped.
        heapq.heappush(heap, (-generator.random(), text))
        num_characters += len(text)
        while num_characters > max_characters and len(heap) > 1:
            num_characters -= len(heapq.heappop(heap)[1])
    return [text for _, text in sorted(heap, reverse=True)]


def _window(old: Tokenizer, new: Tokenizer, text: str, length: int, longest: int) -> _Window | None:
    """Encodes the beginning of a document; None if it is too short or has unknown characters.

    The text is cut first, so that no tokenizer is given a document of millions of characters.

    Args:
        old: The tokenizer of the model.
        new: The extended tokenizer.
        text: The document.
        length: Maximum number of new tokens.
        longest: Maximum number of old tokens: the longest text of the model.
    """
    text = text[: 8 * length]
    student, teacher = new.encode(text)[:length], old.encode(text)
    # Unknown characters have no bytes, so the positions after one could not be compared.
    if len(student) < 2 or old.unk_id in teacher or new.unk_id in student:
        return None
    sizes = new.num_bytes_per_id[student]
    ends = np.cumsum(old.num_bytes_per_id[teacher])[: longest - 1].tolist()
    places = {end: place for place, end in enumerate(ends)}
    matches = [places.get(end, -1) for end in np.cumsum(sizes).tolist()]
    if max(matches) < 0:
        return None
    teacher = teacher[: max(matches) + 1]
    num_bytes = int(sizes[1:].sum())
    if new.add_bos_token:
        student, teacher = [new.bos_id, *student], [old.bos_id, *teacher]
        matches = [-1, *(place + 1 if place >= 0 else -1 for place in matches)]
        num_bytes = int(sizes.sum())
    return _Window(student, teacher, matches, num_bytes)


def _batches(
    windows: Sequence[_Window], num_tokens: int, generator: random.Random
) -> list[list[_Window]]:
    """Groups windows of similar length into batches of up to ``num_tokens``, in random order."""
    shuffled = generator.sample(windows, len(windows))
    shuffled.sort(key=lambda w: len(w.student))
    batches: list[list[_Window]] = [[]]
    for window in shuffled:
        if batches[-1] and (len(batches[-1]) + 1) * len(window.student) > num_tokens:
            batches.append([])
        batches[-1].append(window)
    generator.shuffle(batches)
    return batches


class _Map(torch.nn.Module):
    """What the new rows of a tensor have in common.

    A row is the mean of the rows of its old pieces, plus a matrix times that mean, a multiple of
    the first and of the last piece's row, and a constant. It begins as the mean alone.
    """

    def __init__(self, known: torch.Tensor, pieces: Sequence[Sequence[int]]) -> None:
        super().__init__()
        hidden = known.shape[1]
        # A token without a text has no pieces, and no part in the first and the last ones.
        ends = [(p[0], p[-1]) if p else (0, 0) for p in pieces]
        has_text = torch.tensor([[bool(p)] for p in pieces], device=known.device)
        self._first, self._last = (
            known[torch.tensor([pair[k] for pair in ends], device=known.device)].float() * has_text
            for k in (0, 1)
        )
        self.size = float(known.float().square().mean().sqrt())
        options: dict[str, Any] = {"device": known.device, "dtype": torch.float32}
        self.matrix = torch.nn.Parameter(torch.zeros(hidden, hidden, **options))
        self.weights = torch.nn.Parameter(torch.zeros(2, **options))
        self.constant = torch.nn.Parameter(torch.zeros(hidden, **options))

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Returns rows for the means of the old pieces' rows, ``[new tokens, hidden]``."""
        first, last = self.weights
        ends = first * self._first + last * self._last
        rows: torch.Tensor = mean + mean @ self.matrix + ends + self.constant
        return rows

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameters with their learning rates."""
        return [
            {"params": [self.matrix], "step": MATRIX_STEP, "begin": 0.0},
            {"params": [self.weights], "step": PIECE_STEP, "begin": 0.0},
            {"params": [self.constant], "step": CONSTANT_STEP * self.size, "begin": 0.0},
        ]


class _Student:
    """The frozen model with trainable rows.

    Attributes:
        parameters: float32[fitted, hidden] for each tensor of the vocabulary: what is added to the
            mapped rows of the tokens that occur in the text.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.Tensor],
        shape: LlamaShape,
        growth: VocabularyGrowth,
        fitted: Sequence[int],
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = weights[EMBEDDING].dtype
        narrow = stored == torch.bfloat16 and has_fast_bf16(self.device)
        self._dtype = torch.bfloat16 if narrow else torch.float32
        self._num_old = growth.num_old
        names = [EMBEDDING, OUTPUT] if shape.untie_embeddings_and_output_weights else [EMBEDDING]
        self._fitted = torch.tensor(fitted, device=self.device)
        self._initial: dict[str, torch.Tensor] = {}
        self._known: dict[str, torch.Tensor] = {}
        self.parameters: list[torch.Tensor] = []
        self._maps: dict[str, _Map] = {}
        for name in names:
            grown = grow_rows(weights[name].float(), growth, "mean-of-pieces", seed=0)
            new = grown[growth.num_old : growth.num_old + len(growth.pieces)]
            self._initial[name] = new.to(self.device)
            self._known[name] = weights[name][: growth.num_old].to(self.device, self._dtype)
            self._maps[name] = _Map(self._known[name], growth.pieces)
            self.parameters.append(
                torch.zeros(
                    len(fitted), new.shape[1], device=self.device, dtype=torch.float32
                ).requires_grad_()
            )
        self._model = _decoder(weights, shape, self._dtype, self.device)
        # The teacher's states do not change, so they are computed once.
        self._teacher: dict[int, torch.Tensor] = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns all parameters with their learning rates, from states scored before.

        ``begin`` is the part of the steps before which a group is not fitted.
        """
        rates = self._row_rates()
        groups = [
            {"params": [parameter], "step": rate, "begin": ROWS_BEGIN}
            for parameter, rate in zip(self.parameters, rates, strict=True)
        ]
        return groups + [group for each in self._maps.values() for group in each.parameter_groups()]

    def _row_rates(self) -> list[float]:
        states = torch.cat(list(self._teacher.values())).float()
        output = LOGIT_STEP / float(states.abs().sum(dim=1).mean().clamp(min=1e-30))
        embedding = INPUT_STEP * float(self._known[EMBEDDING].float().square().mean().sqrt())
        if len(self.parameters) == 1:  # rows are both
            return [min(embedding, output)]
        return [embedding, output]

    def rows(self) -> dict[str, torch.Tensor]:
        """Returns a copy of all new rows by tensor, float32[new tokens, hidden] on the CPU."""
        with torch.no_grad():
            return {name: self._rows(name).cpu().clone() for name in self._initial}

    def _rows(self, name: str) -> torch.Tensor:
        parameter = self.parameters[list(self._initial).index(name)]
        mapped: torch.Tensor = self._maps[name](self._initial[name])
        return mapped.index_add(0, self._fitted, parameter)

    def loss(self, batch: Sequence[_Window]) -> torch.Tensor:
        """Computes the loss of a step."""
        states, expected, losses = self._run(batch)
        return losses.mean() + STATE_WEIGHT * _distance(states, expected)

    def score(self, windows: Sequence[_Window]) -> Scores:
        """Computes the scores of windows with the current rows."""
        nats, distances, num_matches = 0.0, 0.0, 0
        with torch.no_grad():
            for batch in _batches(windows, STEP_TOKENS, random.Random(0)):
                states, expected, losses = self._run(batch)
                nats += float(losses.double().sum())
                distances += float(_distance(states, expected)) * len(states)
                num_matches += len(states)
        num_bytes = sum(w.num_bytes for w in windows)
        return Scores(nats / math.log(2) / max(1, num_bytes), distances / max(1, num_matches))

    def _run(self, batch: Sequence[_Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Runs the student.

        Returns:
            Its states and the teacher's at matching positions, ``[matches, hidden]``, and the
            next-token losses, float32[tokens].
        """
        rows = {name: self._rows(name) for name in self._initial}
        ids, lengths = self._pad([w.student for w in batch])
        states = self._model(
            inputs_embeds=self._embed(ids, rows[EMBEDDING]), use_cache=False
        ).last_hidden_state
        inputs = torch.arange(ids.shape[1], device=self.device) < lengths[:, None] - 1
        losses = self._next_token_losses(
            states[inputs], ids[:, 1:][inputs[:, :-1]], list(rows)[-1], rows
        )
        expected = self._teacher_states(batch)
        matched = torch.zeros_like(inputs)
        for k, window in enumerate(batch):
            matched[k, : len(window.matches)] = torch.tensor(window.matches) >= 0
        return states[matched], expected, losses

    def _next_token_losses(
        self,
        states: torch.Tensor,
        labels: torch.Tensor,
        name: str,
        rows: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """Computes the losses in chunks, whose logits are computed again for the gradient."""
        new = rows[name].to(self._dtype)

        def chunk(part: torch.Tensor, targets: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            logits = torch.cat((part @ self._known[name].T, part @ new.T), dim=1).float()
            return functional.cross_entropy(logits, targets, reduction="none")

        size = max(1, _CHUNK_LOGITS // (self._num_old + len(new)))
        parts = zip(torch.split(states, size), torch.split(labels, size), strict=True)
        return torch.cat([checkpoint(chunk, *p, new, use_reentrant=False) for p in parts])

    def _teacher_states(self, batch: Sequence[_Window]) -> torch.Tensor:
        """Returns the teacher's states at the matching positions, in the order of the batch."""
        missing = [w for w in batch if id(w) not in self._teacher]
        if missing:
            ids, _ = self._pad([w.teacher for w in missing])
            with torch.no_grad():
                embedded = functional.embedding(ids, self._known[EMBEDDING])
                states = self._model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            for window, of_window in zip(missing, states, strict=True):
                places = [place for place in window.matches if place >= 0]
                self._teacher[id(window)] = of_window[places].to("cpu", torch.bfloat16)
        known = torch.cat([self._teacher[id(w)] for w in batch])
        return known.to(self.device, self._dtype)

    def _embed(self, ids: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        is_new = (ids >= self._num_old)[..., None]
        old_rows = functional.embedding(ids.clamp(max=self._num_old - 1), self._known[EMBEDDING])
        new_rows = functional.embedding((ids - self._num_old).clamp(min=0), new)
        return torch.where(is_new, new_rows.to(self._dtype), old_rows)

    def _pad(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns ids padded at the end, int64[sequences, longest], and their lengths.

        Causal attention never sees the padding.
        """
        lengths = torch.tensor([len(s) for s in sequences], device=self.device)
        longest = max(map(len, sequences))
        ids = torch.tensor([[*s, *[0] * (longest - len(s))] for s in sequences])
        return ids.to(self.device), lengths


def _distance(states: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared distance, relative to the mean square of ``expected``."""
    states, expected = states.float(), expected.float()
    return (states - expected).square().mean() / expected.square().mean().clamp(min=1e-30)


def _decoder(
    weights: Mapping[str, torch.Tensor],
    shape: LlamaShape,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Builds transformers' model without its output layer, frozen."""
    try:
        import transformers
    except ImportError:
        raise UserError(
            "--embedding-init distill: transformers is not installed; run pip install "
            "'megatron-chatflow[hf]'"
        ) from None
    library_logging: Any = transformers.utils.logging
    library_logging.disable_progress_bar()
    content = huggingface_config(shape, dtype, {})
    library_class: Any = getattr(transformers, content["architectures"][0])
    config: Any = library_class.config_class.from_dict(content)
    model: Any = library_class.from_pretrained(
        None, config=config, state_dict=dict(weights), dtype=dtype
    )
    model.requires_grad_(False)
    return model.model.to(device=device, dtype=dtype).eval()
