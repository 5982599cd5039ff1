"""The training benchmark on data that the loader reads, and what training waits for it.

In: a shape, and the prefix of a dataset or a folder in which one is made up. Out: `OnData`, whose
``step()`` is one of ours on the next batch of a run's own loader, which noted how long it waited.
"""

import statistics
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from megatron_chatflow.blend.blend import Blend
from megatron_chatflow.blend.schedule import Schedule
from megatron_chatflow.config import DataConfig, KnotConfig, ScheduleConfig, SourceConfig
from megatron_chatflow.data.loader import Loader
from megatron_chatflow.data.source import build_sources
from megatron_chatflow.errors import UserError
from megatron_chatflow.evaluation.benchmark_loader_corpus import BenchmarkVocabulary, write_corpus
from megatron_chatflow.train.benchmark_shape import Shape
from megatron_chatflow.train.benchmark_subjects import Ours

_SOURCE = "mock"  # as the benchmark's guard knows it
_NUM_TOKENS = 20_000_000  # of a made-up dataset: 40 MB


class OnData(AbstractContextManager["OnData"]):
    """Our training step on batches from files.

    Attributes:
        waits: Seconds that each step waited for its batch.
    """

    def __init__(self, ours: Ours, shape: Shape, prefix: Path | None, folder: Path) -> None:
        """Opens the dataset, or makes one up in ``folder``.

        Raises:
            UserError: The dataset cannot be read, or has pieces that the shape has not.
        """
        if prefix is None:
            prefix = folder / "corpus"
            write_corpus(prefix, max(_NUM_TOKENS, 64 * shape.num_tokens))
        config = DataConfig(
            seq_length=shape.seq_length,
            sources={_SOURCE: SourceConfig(paths=(prefix,))},
            schedule=ScheduleConfig(knots=(KnotConfig(at=0, weights={_SOURCE: 1.0}),)),
        )
        vocabulary = BenchmarkVocabulary(vocab_size=shape.vocab_size)
        sources = build_sources(config, seed=1, tokenizer=vocabulary)
        schedule = Schedule.from_dict(
            {"knots": [{"at": 0, "weights": {_SOURCE: 1.0}}]},
            sources=[_SOURCE],
            samples_per_iteration=shape.micro_batch_size,
            seq_length=shape.seq_length,
        )
        self.waits: list[float] = []
        self._ours, self._vocab_size = ours, shape.vocab_size
        self._loader = Loader(
            sources,
            Blend(schedule),
            seq_length=shape.seq_length,
            micro_batch_size=shape.micro_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
        )
        self._batches = self._loader.batches(0, shape.micro_batch_size)

    def step(self) -> float:
        """Takes one step."""
        begin = time.perf_counter()
        batch = next(self._batches)
        self.waits.append(time.perf_counter() - begin)
        highest = int(max(micro_batch.tokens.max() for micro_batch in batch.micro_batches))
        if highest >= self._vocab_size:
            raise UserError(f"--data: piece {highest} is none of the shape's {self._vocab_size}")
        return self._ours.step(batch)

    def median_wait(self) -> float:
        """Seconds; the first batch, which nothing was there to prepare, is left out."""
        return statistics.median(self.waits[1:])

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Ends the loader's threads."""
        self._loader.close()
