"""Tests the filters of pairs: each drops what it says and counts it, in any division of a job."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parallel_files import aligned_text, tmx, unit
from preprocess_jobs import Jobs

from megatron_chatflow.errors import UserError
from megatron_chatflow.preprocess.pair_filters import numbers_of, punctuation_share
from megatron_chatflow.preprocess.pairs import PairSettings, documents_of_pair
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import Chunk
from megatron_chatflow.preprocess.settings import CorpusSettings
from megatron_chatflow.tokenizer.documents import DroppedError


@pytest.fixture
def jobs(tmp_path: Path, tiny_sentencepiece_model: Path) -> Jobs:
    return Jobs(tmp_path, tiny_sentencepiece_model)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("no number, or a single 7", set()),
        ("In 2020, 1,234,567 of 10 000", {2020, 1234567, 10}),
        ("\uff11\uff12 and \u0663\u0664 and 012", {12, 34}),
        ("3.14 on 12:30", {14, 12, 30}),
        ("1,23 and 12,3456", {23, 12, 3456}),
        ("9" * 5000, {int("9" * 1000)}),
    ],
)
def test_numbers(text: str, numbers: set[int]) -> None:
    assert numbers_of(text) == numbers


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("ab", 0.0),
        ("a!", 0.5),
        ("\u3002\u3001 ", 1.0),
        ("a b $ +", 0.5),
        ("a\u0301", 0.0),
    ],
)
def test_punctuation(text: str, share: float) -> None:
    assert punctuation_share(text) == share


@pytest.mark.parametrize(
    ("options", "kept", "dropped", "reason"),
    [
        (
            {"numbers": "same"},
            ("in 2020", "2020\u5e74"),
            ("in 2020", "2021\u5e74"),
            "different_numbers",
        ),
        (
            {"numbers": "same"},
            ("1,000 men", "1000\u4eba"),
            ("12", "\u5341\u4e8c"),
            "different_numbers",
        ),
        ({"numbers": "same"}, ("3 men", "\u4e09\u4eba"), ("10 men", "\u4eba"), "different_numbers"),
        (
            {"max_punctuation_ratio": 0.5},
            ("a, b.", "\u7532\u3001\u4e59"),
            ("a b", "\u7532--->"),
            "punctuation_ratio",
        ),
        ({}, ("in 2020", "2021\u5e74"), ("a", "a"), "identical_sides"),
        ({"max_length_ratio": 2.0}, ("abcd", "\u7532"), ("abcdefg", "\u7532"), "length_ratio"),
    ],
)
def test_filters(
    options: dict[str, Any], kept: tuple[str, str], dropped: tuple[str, str], reason: str
) -> None:
    settings = PairSettings(**options)
    assert documents_of_pair(*kept, settings, "chatflow", "response")
    with pytest.raises(DroppedError, match=f"^{reason}$"):
        documents_of_pair(*dropped, settings, "chatflow", "response")


ENGLISH = "The committee will meet again on Thursday to discuss the budget of the coming year."
FRENCH = "Le comit\u00e9 se r\u00e9unira de nouveau jeudi pour discuter du budget de l'an prochain."
CHINESE = (
    "\u59d4\u5458\u4f1a\u5c06\u4e8e\u5468\u56db\u5f00\u4f1a\uff0c\u8ba8\u8bba\u9884\u7b97\u3002"
)


def test_language_identification() -> None:
    pytest.importorskip("py3langid")
    settings = PairSettings(identify_languages=True)
    variant = PairSettings(identify_languages=True, languages=("en-US", "zh_CN"))
    for accepted in ((ENGLISH, CHINESE), ("42", "\u7532")):
        assert documents_of_pair(*accepted, settings, "chatflow", "response")
        assert documents_of_pair(*accepted, variant, "chatflow", "response")
    # The model alone takes these for Cantonese.
    unlimited = PairSettings(identify_languages=True, max_length_ratio=0)
    cantonese = replace(unlimited, keys=("en", "yue"))
    for chinese in (
        "\u4f60\u597d",
        "\u9577\u6c5f\u767c\u6e90\u65bc\u9752\u85cf\u9ad8\u539f\uff0c"
        "\u6d41\u7d93\u5341\u4e00\u500b\u7701\u4efd\u3002",
    ):
        assert documents_of_pair(ENGLISH, chinese, unlimited, "chatflow", "response")
        assert documents_of_pair(ENGLISH, chinese, cantonese, "chatflow", "response")
    # Only the beginning is identified.
    longer = ENGLISH * 60 + FRENCH * 600
    assert documents_of_pair(longer, CHINESE, unlimited, "chatflow", "response")
    for pair in ((FRENCH, CHINESE), (ENGLISH, FRENCH), (CHINESE, ENGLISH)):
        with pytest.raises(DroppedError, match="^wrong_language$"):
            documents_of_pair(*pair, settings, "chatflow", "response")


def test_settings_that_cannot_work(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jobs.lines("a.jsonl", [{"en": "bana", "zh": "kedo"}])

    def fail(message: str, **options: Any) -> None:
        corpus = CorpusSettings(format="pairs", pairs=PairSettings(**options))
        with pytest.raises(UserError, match=message):
            jobs.run(path, corpus=corpus)
        assert sorted(p.name for p in jobs.folder.iterdir()) == ["a.jsonl"]

    fail("--pair-min-score: nan: must be a finite", min_score=float("nan"))
    fail("--pair-max-punctuation-ratio: 1.5: must be from 0", max_punctuation_ratio=1.5)
    if "py3langid" in sys.modules or pytest.importorskip("py3langid"):
        fail(
            "--pair-identify-languages: x-y: is not among",
            identify_languages=True,
            keys=("en", "x-y"),
        )
    from megatron_chatflow.preprocess import languages

    languages._model.cache_clear()
    languages.language_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    fail("by py3langid: pip install py3langid", identify_languages=True)
    languages._model.cache_clear()


@pytest.mark.parametrize("name", ["a.tsv", "a.tmx", "a.tsv.gz"])
def test_files_of_pairs_are_refused_before_a_job_of_text_begins(jobs: Jobs, name: str) -> None:
    (jobs.folder / name).write_bytes(b"")
    text = jobs.lines("0.jsonl", [{"text": "bana"}])
    with pytest.raises(UserError, match=f"pairs: {name}: use --format pairs"):
        # The tokenizer would be loaded before any file is read.
        jobs.model = jobs.folder / "missing"
        jobs.run(text, str(jobs.folder / name))


def test_scores_of_json_lines() -> None:
    records: list[dict[str, Any]] = [
        {"en": "a", "zh": "b", "m": {"score": 0.9}},
        {"en": "c", "zh": "d", "m": {"score": "0.1"}},
        {"en": "e", "zh": "f"},
        {"en": "g", "zh": "h", "m": {"score": None}},
    ]
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    pairs = PairSettings(min_score=0.5, score="m.score")
    result = parse_chunk(
        Chunk("f", 1, "lines", lines, 0), CorpusSettings(format="pairs", pairs=pairs)
    )
    assert len(result.documents["text"]) == 1
    assert result.num_dropped == {"low_score": 1, "no_key_m.score": 1, "score_not_a_number": 1}


def test_pairs_below_the_score_do_not_fail_the_job(jobs: Jobs) -> None:
    """Most mined pairs may be below the score, and most units in other languages."""
    records = [{"en": f"bana {k}", "zh": f"kedo {k}", "score": k} for k in range(100)]
    path = jobs.lines("a.jsonl", records)
    corpus = CorpusSettings(format="pairs", pairs=PairSettings(min_score=95))
    content = jobs.run(path, corpus=corpus)
    assert (content["num_documents"], content["dropped"]) == (5, {"low_score": 95})
    units = [unit(en="bana", fr="luno")] * 9 + [unit(en="bana", zh="kedo")]
    (jobs.folder / "a.tmx").write_text(tmx(units))
    content = jobs.run(str(jobs.folder / "a.tmx"), corpus=CorpusSettings(format="pairs"))
    assert (content["num_documents"], content["dropped"]) == (1, {"no_language_zh": 9})
    (jobs.folder / "a.tmx").write_text(tmx(units[:9]))
    with pytest.raises(UserError, match=r"no document left: .*9 no_language_zh \(set the lang"):
        jobs.run(str(jobs.folder / "a.tmx"), corpus=CorpusSettings(format="pairs"))


# The second pair repeats the first side of the first pair, and the third the second side of the
# second pair, so only the first of them is kept. The last repeats nothing.
REPEATED = [("bana", "kedo"), ("bana", "luno"), ("sanka", "luno"), ("kedo", "bana")]


@pytest.mark.parametrize("direction", ["hash", "forward", "both"])
def test_duplicates_of_either_side(jobs: Jobs, direction: Any) -> None:
    corpus = CorpusSettings(format="pairs", pairs=PairSettings(dedup="either", direction=direction))
    path = jobs.lines("a.jsonl", [{"en": en, "zh": zh} for en, zh in REPEATED])
    content = jobs.run(path, corpus=corpus)
    num_documents = 2 if direction == "both" else 1
    assert content["num_documents"] == 2 * num_documents
    assert content["dropped"] == {"duplicate": 2 * num_documents}
    kept = jobs.documents()
    expected = jobs.lines("b.jsonl", [{"en": en, "zh": zh} for en, zh in REPEATED[::3]])
    jobs.run(
        expected, corpus=CorpusSettings(format="pairs", pairs=PairSettings(direction=direction))
    )
    assert jobs.documents() == kept


@pytest.mark.parametrize("num_partitions", [2, 3, 9])
def test_duplicates_in_partitions(jobs: Jobs, num_partitions: int) -> None:
    """A pair that is dropped still decides about later ones, also in another partition."""
    for number in range(7):
        pairs = [(f"bana {k * number % 5}", f"kedo {k + number % 3}") for k in range(6)]
        (jobs.folder / f"{number}.en").write_bytes(aligned_text(pairs, 0))
        (jobs.folder / f"{number}.zh").write_bytes(aligned_text(pairs, 1))
    inputs = str(jobs.folder / "*.??")
    corpus = CorpusSettings(format="pairs", pairs=PairSettings(dedup="either", direction="both"))
    whole = jobs.run(inputs, corpus=corpus, max_dropped_share=1.0)
    files = {path.name: path.read_bytes() for path in jobs.folder.glob("out_*.???")}
    assert 0 < whole["num_documents"] < 2 * 7 * 6 and "duplicate" in whole["dropped"]
    merged = jobs.run(inputs, corpus=corpus, max_dropped_share=1.0, num_partitions=num_partitions)
    assert merged == whole
    assert {path.name: path.read_bytes() for path in jobs.folder.glob("out_*.???")} == files
    assert not list(jobs.folder.glob("*.hashes"))


def test_sidecars_record_only_the_filters_in_use(jobs: Jobs) -> None:
    path = jobs.lines("a.jsonl", [{"en": "bana", "zh": "kedo"}])
    plain = jobs.run(path, corpus=CorpusSettings(format="pairs"))["settings"]["pairs"]
    assert set(plain) == {
        "keys",
        "languages",
        "template",
        "texts",
        "direction",
        "max_length_ratio",
        "scripts",
        "level",
    }
    pairs = PairSettings(numbers="same", dedup="either")
    content = jobs.run(path, corpus=CorpusSettings(format="pairs", pairs=pairs))
    assert content["settings"]["pairs"] == {**plain, "numbers": "same", "dedup": "either"}


def test_codes_in_instructions_are_pointed_out(
    jobs: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    path = jobs.lines("a.jsonl", [{"en": "bana", "zh": "kedo"}])
    pairs = PairSettings(languages=("en", "zh"), template="translate")
    jobs.run(path, corpus=CorpusSettings(format="pairs", pairs=pairs))
    assert any("instructions will name the languages by these codes" in m for m in caplog.messages)
    caplog.clear()
    pairs = PairSettings(template="translate")
    jobs.run(path, corpus=CorpusSettings(format="pairs", pairs=pairs))
    assert not any("codes" in message for message in caplog.messages)
