"""Runs cleaning jobs on this machine, on a Ray cluster or on Slurm.

A job has up to four stages, each of which is a datatrove pipeline with a fixed number of tasks:

1. `filter`: one task per input file reads, changes, filters and decontaminates documents and, for
   MinHash, computes signatures;
2. `buckets`: one task per bucket finds equal signatures;
3. `cluster`: one task groups near-duplicates;
4. `deduplicate`: one task per input file keeps one document of every group.

All files are written to the folder `OUTPUT.partial`. A job that was killed continues there after
its last finished tasks. At the end, the folder of removed documents and then the output folder get
their final names; a folder that is missing in `OUTPUT.partial` already has its final name.
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from megatron_chatflow.errors import UserError
from megatron_chatflow.files import (
    FileLock,
    check_output_folder,
    replace_folder,
    sync_tree,
    write_atomically,
)
from megatron_chatflow.preprocess.cleaning.decontaminate import (
    MIN_WORDS,
    Match,
    read_evaluation_files,
)
from megatron_chatflow.preprocess.cleaning.texts import chinese_converter, language_identifier
from megatron_chatflow.preprocess.job import ray_session
from megatron_chatflow.preprocess.readers import InputFile, find_inputs, open_input
from megatron_chatflow.preprocess.settings import CorpusSettings

FILTERS = ("gopher-quality", "gopher-repetition", "c4", "fineweb")
# The hidden files with the counts of a job in its output folder, and with its settings in the
# folder of removed documents. Only folders with them are replaced. Readers skip hidden files.
COUNTS_FILE = ".cleaning.json"
REMOVED_FILE = ".removed.json"
_SETTINGS_FILE = "settings.json"
_EVALUATION_FILE = "evaluation.json"  # the numbers of searched and of short texts


@dataclass(frozen=True)
class MinHashSettings:
    """Settings of fuzzy deduplication.

    Two documents with the Jaccard similarity s of their n-grams are found with the probability
    1 - (1 - s^hashes)^buckets. With the defaults, it is 0.97 for s = 0.8 and 0.08 for s = 0.5.
    """

    num_words: int = 5  # words of an n-gram; characters in scripts without spaces
    num_buckets: int = 20
    num_hashes: int = 8  # hashes of a bucket


@dataclass(frozen=True)
class CleanSettings:
    """Settings of a cleaning job."""

    inputs: tuple[str, ...]  # files, folders or globs
    output: str  # path of the output folder
    # settings for reading the inputs; has one key, which is that of the text
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    # the script to convert Chinese text to; None for no conversion
    chinese: Literal["simplified", "traditional"] | None = None
    max_repeated_punctuation: int | None = None  # longer runs are shortened to this length
    remove_boilerplate: bool = False  # whether to remove lines of navigation and notices
    languages: tuple[str, ...] = ()  # codes of the languages to keep; empty for all
    language_threshold: float = 0.65  # minimum probability of the language
    filters: tuple[str, ...] = ()  # names in `FILTERS`
    decontaminate: tuple[str, ...] = ()  # evaluation files
    decontaminate_ngram: int = 13  # words of an n-gram
    decontaminate_match: tuple[Match, ...] = ("ngram", "exact")
    minhash: MinHashSettings | None = None  # settings of fuzzy deduplication; None for none
    removed: str | None = None  # path of a folder for the documents that are removed
    num_workers: int = 1
    max_bad_lines: int = 100
    overwrite: bool = False
    ray: str | None = None  # address of a Ray cluster
    slurm_partition: str | None = None
    slurm_time: str = "24:00:00"

    def record(self, files: Sequence[InputFile]) -> dict[str, Any]:
        """Returns what determines the output, to recognize the job when it continues."""
        names = ("num_workers", "max_bad_lines", "overwrite", "ray", "slurm_partition")
        settings = {name: v for name, v in asdict(self).items() if name not in names}
        del settings["slurm_time"]
        inputs = [[str(file.path), file.num_bytes] for file in files]
        used = {"datatrove": True, "py3langid": self.languages, "opencc": self.chinese}
        facts = {
            "files": inputs,
            "evaluation_files": [[f.name, _sha256(f)] for f in self.evaluation_files()],
            # Models and dictionaries differ between versions.
            "versions": {name: version(name) for name, is_used in used.items() if is_used},
        }
        recorded: dict[str, Any] = json.loads(json.dumps({**settings, **facts}))
        return recorded

    def evaluation_files(self) -> list[InputFile]:
        """Returns the files of `decontaminate`.

        Raises:
            UserError: A file does not exist, or can be read only once.
        """
        files = find_inputs(self.decontaminate) if self.decontaminate else []
        for file in files:
            if file.path is None or (isinstance(file.path, Path) and not file.path.is_file()):
                raise UserError(f"--decontaminate {file.name}: is read twice: give a file")
        return files


def _sha256(file: InputFile) -> str:
    digest = hashlib.sha256()
    with open_input(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class StepCounts:
    """The counts of one step."""

    name: str
    dropped: dict[str, int]  # number of dropped documents by reason
    num_changed: int = 0  # number of documents with a changed text


@dataclass
class Counts:
    """The counts of a job."""

    num_read: int
    num_written: int
    bad_lines: dict[str, int]  # number of records that are not documents, by reason
    steps: list[StepCounts]
    first_bad: str | None = None  # `file:line: reason` of the first of them
    # number of evaluation texts that were searched, and of those that are too short for it
    num_evaluation_texts: int = 0
    num_short_evaluation_texts: int = 0

    def describe(self) -> list[str]:
        """Returns the counts as lines of text."""
        lines = [f"read {self.num_read} documents"]
        if self.bad_lines:
            lines[0] += f"; {sum(self.bad_lines.values())} records are not documents: "
            lines[0] += _listing(self.bad_lines)
        if self.num_evaluation_texts:
            lines.append(
                f"searched {self.num_evaluation_texts} evaluation texts; "
                f"{self.num_short_evaluation_texts} are too short"
            )
        for step in self.steps:
            parts = [f"changed {step.num_changed}"] if step.num_changed else []
            if step.dropped:
                listing = f" ({_listing(step.dropped)})" if set(step.dropped) != {""} else ""
                parts.append(f"dropped {sum(step.dropped.values())}{listing}")
            lines.append(f"{step.name}: {', '.join(parts) or 'dropped 0'}")
        return [*lines, f"wrote {self.num_written} documents"]


def _listing(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason or 'others'}" for reason, count in ordered)


def clean(settings: CleanSettings) -> Counts | None:
    """Runs a cleaning job and returns its counts; None if it was submitted to Slurm.

    Raises:
        UserError: A setting is invalid, an input cannot be read or has too many bad lines, the
            output exists, no document is left, or a package is missing.
    """
    files = find_inputs(settings.inputs)
    settings = replace(
        settings,
        output=os.path.abspath(settings.output),
        removed=None if settings.removed is None else os.path.abspath(settings.removed),
    )
    output = Path(settings.output)
    work = _work_folder(output)
    _check(settings, files)
    _check_places(settings, files, work)
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock.acquire(output.with_name(f".{output.name}.lock"))
    if lock is None:
        raise UserError(f"{output}: another process is writing it: wait until it finishes")
    try:
        if not _begin(settings, files, work):
            try:
                stages = _stages(settings, files, work)
                if settings.slurm_partition is not None:
                    _run_on_slurm(settings, stages, work)
                    return None
                _run(settings, stages, work)
            except UserError:  # the same job would fail again
                shutil.rmtree(work)
                raise
        counts = publish(settings, work)
        shutil.rmtree(work)
        return counts
    finally:
        lock.release()


def _run(settings: CleanSettings, stages: "list[Stage]", work: Path) -> None:
    session: AbstractContextManager[Any] = nullcontext()
    if settings.ray is not None:
        session = ray_session(settings.ray)
    with session:
        for name, pipeline, num_tasks in stages:
            with _output_to(work / "log.txt"):
                _executor(settings, name, pipeline, num_tasks, work).run()
            if name == "filter":
                _check_counts(read_counts(work), settings)


def _work_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def _check(settings: CleanSettings, files: Sequence[InputFile]) -> None:
    for file in files:
        if not isinstance(file.path, Path) or not file.path.is_file():
            raise UserError(f"cannot be cleaned: {file.name}: use local files, folders or globs")
    if len(settings.corpus.json_keys) != 1:
        raise UserError("--json-key: give one key, that of the text")
    if unknown := sorted(set(settings.filters) - set(FILTERS)):
        raise UserError(f"--filters {' '.join(unknown)}: give some of {', '.join(FILTERS)}")
    if not 0 <= settings.language_threshold <= 1:
        raise UserError(f"--language-threshold {settings.language_threshold}: must be from 0 to 1")
    minhash = settings.minhash or MinHashSettings()
    minimums = {
        "--workers": (settings.num_workers, 1),
        "--max-bad-lines": (settings.max_bad_lines, 0),
        "--max-repeated-punctuation": (settings.max_repeated_punctuation or 1, 1),
        "--decontaminate-ngram": (settings.decontaminate_ngram, MIN_WORDS),
        "--minhash-ngram": (minhash.num_words, 1),
        "--minhash-buckets": (minhash.num_buckets, 1),
        "--minhash-hashes": (minhash.num_hashes, 1),
    }
    for flag, (value, smallest) in minimums.items():
        if value < smallest:
            raise UserError(f"{flag} {value}: must be at least {smallest}")
    if settings.ray is not None and settings.slurm_partition is not None:
        raise UserError("--ray and --slurm-partition: give only one of them")
    for path in (settings.output, settings.removed):
        if path is not None:
            check_output_folder(Path(path))
    # A missing package is reported before anything is read.
    if settings.languages:
        language_identifier()
    if settings.chinese is not None:
        chinese_converter(settings.chinese)
    try:
        import datatrove.pipeline.dedup  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"cleaning needs datatrove and {error.name}: pip install 'megatron-chatflow[clean]'"
        ) from error


def _check_places(settings: CleanSettings, files: Sequence[InputFile], work: Path) -> None:
    """Checks that no folder that is written contains an input or another of these folders.

    They are replaced as a whole. An input folder must not contain them either, because a job that
    continues would read them.
    """
    read = [*files, *settings.evaluation_files()]
    inputs = {str(f.path): os.path.realpath(f.path) for f in read if isinstance(f.path, Path)}
    folders = {
        name: os.path.realpath(name)
        for name in (*settings.inputs, *settings.decontaminate)
        if os.path.isdir(name)
    }
    written = [("--output", settings.output), ("--output", str(work))]
    if settings.removed is not None:
        written.append(("--removed", settings.removed))
    for flag, path in written:
        real = os.path.realpath(path)
        for name, file in inputs.items():
            if _is_within(file, real):
                raise UserError(f"{path}: contains the input {name}: choose another {flag}")
        for name, folder in folders.items():
            if _is_within(real, folder):
                raise UserError(f"{path}: is in the input folder {name}: choose another {flag}")
    if settings.removed is None:
        return
    removed = os.path.realpath(settings.removed)
    for _, path in written[:2]:
        real = os.path.realpath(path)
        if _is_within(real, removed) or _is_within(removed, real):
            raise UserError(f"{settings.removed}: overlaps {path}: choose another --removed")
    if _device_of(Path(settings.removed).parent) != _device_of(work.parent):
        raise UserError(
            f"{settings.removed}: is on another file system than {settings.output}: choose another "
            "--removed"
        )


def _is_within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _device_of(path: Path) -> int:
    """Returns the device of a folder, or of its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _folders(settings: CleanSettings) -> list[tuple[str, Path, str]]:
    """Returns the name in the folder of the job, the final path and the mark of each output."""
    folders = [("output", Path(settings.output), COUNTS_FILE)]
    if settings.removed is not None:
        folders.insert(0, ("removed", Path(settings.removed), REMOVED_FILE))
    return folders


def _check_replaceable(path: Path, name: str, mark: str, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: exists and is not a folder: choose another --{name}")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / mark).exists():
        raise UserError(
            f"{path}: was not written by this command and is not replaced: choose another --{name}"
        )
    if not overwrite:
        raise UserError(f"{path}: exists: choose another --{name}, or use --overwrite")


def _begin(settings: CleanSettings, files: Sequence[InputFile], work: Path) -> bool:
    """Creates the folder of the job, or continues in that of an equal job that was killed.

    Returns:
        Whether all stages are finished, because a folder already has its final name.
    """
    record = settings.record(files)
    path = work / _SETTINGS_FILE
    try:
        is_continued = json.loads(path.read_bytes()) == record
    except (OSError, ValueError):
        is_continued = False
    folders = _folders(settings)
    published = [folder for folder in folders if is_continued and not (work / folder[0]).exists()]
    for folder in folders:
        name, final, mark = folder
        if folder not in published:
            _check_replaceable(final, name, mark, settings.overwrite)
        elif not (final / mark).exists():
            raise UserError(f"{final}: was removed while the job was not finished: remove {work}")
    if is_continued:
        return bool(published)
    if work.exists():
        if not settings.overwrite and any(work.iterdir()):
            raise UserError(f"{work}: belongs to another job: remove it, or use --overwrite")
        shutil.rmtree(work)
    work.mkdir()
    for name, _, _ in folders:
        (work / name).mkdir()
    write_atomically(path, json.dumps(record, indent=1))
    return False


Stage = tuple[str, list[Any], int]  # name, pipeline and number of tasks


def _stages(settings: CleanSettings, files: Sequence[InputFile], work: Path) -> list[Stage]:
    from megatron_chatflow.preprocess.cleaning import steps

    (key,) = settings.corpus.json_keys
    files = [replace(file, path=Path(str(file.path)).absolute()) for file in files]

    def removed(name: str) -> Any:
        if settings.removed is None:
            return None
        path = f"{name}/{steps.FILE_NAME}"
        return steps.WriteRecords(str(work / "removed"), key, path, why=True)

    pipeline: list[Any] = [steps.ReadCorpus(files, settings.corpus)]
    if settings.chinese is not None:
        pipeline.append(steps.ConvertChinese(settings.chinese))
    if settings.max_repeated_punctuation is not None:
        pipeline.append(steps.LimitPunctuation(settings.max_repeated_punctuation))
    if settings.remove_boilerplate:
        pipeline.append(steps.RemoveBoilerplate(removed("boilerplate")))
    if settings.languages:
        pipeline.append(
            steps.KeepLanguages(
                settings.languages, settings.language_threshold, removed("language")
            )
        )
    for name in settings.filters:
        chinese, others = steps.QUALITY_FILTERS[name]()
        pipeline.append(steps.ByScript(name, chinese, others, removed(name)))
    if settings.decontaminate:
        index = read_evaluation_files(
            settings.decontaminate, settings.decontaminate_ngram, settings.decontaminate_match
        )
        numbers = [index.num_texts, index.num_short]
        write_atomically(work / _EVALUATION_FILE, json.dumps(numbers))
        pipeline.append(steps.Decontaminate(index, removed("decontamination")))
    output = str(work / "output")
    if settings.minhash is None:
        pipeline.append(steps.WriteRecords(output, key))
        return [("filter", pipeline, len(files))]
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )

    minhash = settings.minhash
    config = steps.minhash_config(minhash.num_words, minhash.num_buckets, minhash.num_hashes)
    filtered, signatures, buckets, clusters = (
        str(work / name) for name in ("filtered", "signatures", "buckets", "clusters")
    )
    pipeline.append(steps.WriteRecords(filtered, key))
    pipeline.append(MinhashDedupSignature(signatures, config, steps.WORDS))
    deduplicate = [
        steps.ReadStage(filtered, key),
        MinhashDedupFilter(clusters, removed("minhash")),
        steps.WriteRecords(output, key),
    ]
    return [
        ("filter", pipeline, len(files)),
        ("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        ("cluster", [MinhashDedupCluster(buckets, clusters, config)], 1),
        ("deduplicate", deduplicate, len(files)),
    ]


def _executor(
    settings: CleanSettings, name: str, pipeline: list[Any], num_tasks: int, work: Path
) -> Any:
    logs = str(work / "logs" / name)
    if settings.ray is not None:
        from datatrove.executor import RayPipelineExecutor

        return RayPipelineExecutor(pipeline, tasks=num_tasks, logging_dir=logs)
    from datatrove.executor import LocalPipelineExecutor

    workers = min(settings.num_workers, num_tasks)
    executor = LocalPipelineExecutor(pipeline, tasks=num_tasks, workers=workers, logging_dir=logs)
    return _InThisProcess(executor) if workers == 1 else executor


@dataclass(frozen=True)
class _InThisProcess:
    """Runs the tasks of an executor one after the other without starting a process."""

    executor: Any

    def run(self) -> None:
        from copy import deepcopy

        pipeline = self.executor.pipeline
        for rank in self.executor.get_incomplete_ranks():
            self.executor.pipeline = deepcopy(pipeline)  # with counts of zero
            self.executor._run_for_rank(rank)


def _run_on_slurm(settings: CleanSettings, stages: list[Stage], work: Path) -> None:
    """Submits the stages as jobs that depend on each other, and a job that publishes the output."""
    from datatrove.executor import SlurmPipelineExecutor

    before = None
    for name, pipeline, num_tasks in [*stages, ("publish", [PublishStep(settings)], 1)]:
        before = SlurmPipelineExecutor(
            pipeline,
            tasks=num_tasks,
            time=settings.slurm_time,
            partition=str(settings.slurm_partition),
            workers=settings.num_workers,
            job_name=f"clean_{name}",
            depends=before,
            logging_dir=str(work / "logs" / name),
            slurm_logs_folder=str(work / "slurm" / name),
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
            mail_type="NONE",
        )
    with _output_to(work / "log.txt"):
        assert before is not None
        before.run()


@dataclass(frozen=True)
class PublishStep:
    """The step of a Slurm job that publishes the output."""

    settings: CleanSettings

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Publishes the output and removes the files that only the job needs."""
        work = _work_folder(Path(self.settings.output))
        publish(self.settings, work)
        for name in ("filtered", "signatures", "buckets", "clusters"):
            shutil.rmtree(work / name, ignore_errors=True)
        # Only logs are left, with which no job can continue.
        (work / _SETTINGS_FILE).unlink(missing_ok=True)


def publish(settings: CleanSettings, work: Path) -> Counts:
    """Checks the counts of a job and gives the output folders their final names.

    Folders that got them before the job was killed are left as they are.

    Raises:
        UserError: There are too many bad lines, no document is left, or a folder exists.
    """
    if not (work / "output").exists():
        return _published_counts(Path(settings.output))
    counts = read_counts(work)
    _check_counts(counts, settings)
    record = json.loads((work / _SETTINGS_FILE).read_bytes())
    recorded = {name: v for name, v in record.items() if name not in ("output", "removed")}
    contents = {
        COUNTS_FILE: {**asdict(counts), "settings": recorded},
        REMOVED_FILE: {"settings": recorded},
    }
    for name, path, mark in _folders(settings):
        made = work / name
        if not made.exists():
            continue
        _check_replaceable(path, name, mark, settings.overwrite)
        write_atomically(made / mark, json.dumps(contents[mark], ensure_ascii=False, indent=1))
        sync_tree(made)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(path, made, path.with_name(f".{path.name}.old"))
    return counts


def _published_counts(output: Path) -> Counts:
    content = json.loads((output / COUNTS_FILE).read_bytes())
    del content["settings"]
    steps = [StepCounts(**step) for step in content.pop("steps")]
    return Counts(**content, steps=steps)


def _check_counts(counts: Counts, settings: CleanSettings) -> None:
    num_bad = sum(counts.bad_lines.values())
    if num_bad > settings.max_bad_lines:
        raise UserError(
            f"too many bad lines: {num_bad} ({_listing(counts.bad_lines)}); the first is "
            f"{counts.first_bad}: correct the input, or raise --max-bad-lines "
            f"({settings.max_bad_lines})"
        )
    if not counts.num_written:
        steps = [f"{step.name} {sum(step.dropped.values())}" for step in counts.steps]
        raise UserError(
            f"no document left: read {counts.num_read}, dropped: {', '.join(steps) or 'none'}"
        )


def read_counts(work: Path) -> Counts:
    """Sums the statistics that the finished tasks of a job have written."""
    totals: dict[str, list[tuple[str, Counter[str]]]] = {}
    for stage in ("filter", "deduplicate"):
        for path in sorted((work / "logs" / stage / "stats").glob("*.json")):
            for k, step in enumerate(json.loads(path.read_bytes())):
                of_stage = totals.setdefault(stage, [])
                if k == len(of_stage):
                    of_stage.append((step["name"], Counter()))
                for name, value in step["stats"].items():
                    number = value["total"] if isinstance(value, dict) else value
                    of_stage[k][1][name] += int(number)
    reader, *others = totals.get("filter", [("", Counter())])
    bad = {
        name.removeprefix("bad line: "): count
        for name, count in sorted(reader[1].items())
        if name.startswith("bad line: ")
    }
    first_bad = next((name for name in reader[1] if name.startswith("first bad line: ")), None)
    steps: list[StepCounts] = []
    num_written = 0
    for name, counter in [*others, *totals.get("deduplicate", [])]:
        short = name.rsplit(" ", 1)[-1]
        if "WRITER" in name:
            num_written = counter["total"]
        elif "FORMAT" in name or "FILTER" in name:
            steps.append(StepCounts(short, _reasons(counter), counter["changed"]))
        elif "MinHash stage 4" in name:
            dropped = {"": counter["dropped"]} if counter["dropped"] else {}
            steps.append(StepCounts("minhash", dropped))
    first = first_bad and first_bad.removeprefix("first bad line: ")
    evaluation = work / _EVALUATION_FILE
    num_texts, num_short = json.loads(evaluation.read_bytes()) if evaluation.exists() else (0, 0)
    return Counts(reader[1]["total"], num_written, bad, steps, first, num_texts, num_short)


def _reasons(counter: Counter[str]) -> dict[str, int]:
    reasons = {
        name.removeprefix("dropped_"): count
        for name, count in sorted(counter.items())
        if name.startswith("dropped_")
    }
    others = counter["dropped"] - sum(reasons.values())
    return {**reasons, "": others} if others else reasons


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends standard error, on which datatrove logs, to a file for the duration of the block."""
    from loguru import logger

    sys.stderr.flush()
    saved = os.dup(2)
    with path.open("a", encoding="utf-8") as log, redirect_stderr(log):
        try:
            os.dup2(log.fileno(), 2)  # for other processes
            logger.remove()
            logger.add(log)
            yield
        finally:
            logger.remove()
            os.dup2(saved, 2)
            os.close(saved)
