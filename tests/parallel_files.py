"""Writes small files of parallel text in the forms in which OPUS and others publish it."""

import zipfile
from pathlib import Path
from typing import Any

from megatron_chatflow.preprocess.pairs import PairSettings, PairText
from megatron_chatflow.preprocess.parse import parse_chunk
from megatron_chatflow.preprocess.readers import CorpusReader, find_inputs
from megatron_chatflow.preprocess.settings import CorpusSettings

PAIRS = [(f"bana {k}", f"\u53e5 {k}") for k in range(60)]
SEPARATOR = "\x1f"  # of the sides in the documents that `read_pairs` splits
README = "Corpus Name: Made-up\n     Package: Made-up in Moses format\n     License: none\n"


def aligned_text(pairs: list[tuple[str, str]], side: int) -> bytes:
    return "".join(f"{pair[side]}\n" for pair in pairs).encode()


def write_opus_archive(
    path: Path, pairs: list[tuple[str, str]], *, scores: list[float] | None = None
) -> Path:
    """Writes a zip archive with the files of OPUS's downloads in Moses format.

    Such an archive, for example `en-zh.txt.zip`, contains a file for each language, the sentence
    alignment in XML, a readme and a license, and for mined corpora the score of each pair.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("README", README)
        archive.writestr("LICENSE", "none")
        archive.writestr("Made-up.en-zh.en", aligned_text(pairs, 0))
        archive.writestr("Made-up.en-zh.zh", aligned_text(pairs, 1))
        archive.writestr("Made-up.en-zh.xml", alignment(len(pairs)))
        if scores is not None:
            archive.writestr("Made-up.en-zh.scores", "".join(f"{score}\n" for score in scores))
    return path


def alignment(num_pairs: int) -> str:
    links = "".join(f'<link xtargets="{k};{k}" id="SL{k}" />\n' for k in range(1, num_pairs + 1))
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE cesAlign PUBLIC "-//CES//DTD XML '
        'cesAlign//EN" "">\n<cesAlign version="1.0">\n<linkGrp fromDoc="en/a.xml.gz" '
        f'toDoc="zh/a.xml.gz">\n{links}</linkGrp>\n</cesAlign>\n'
    )


def tmx(units: list[str], head: str = '<?xml version="1.0" encoding="UTF-8"?>') -> str:
    return (
        f'{head}\n<tmx version="1.4">\n<header creationdate="20240101" srclang="en" '
        'adminlang="en" segtype="sentence" datatype="PlainText" o-tmf="x" creationtool="x" '
        f'creationtoolversion="1"><prop type="score">9</prop></header>\n<body>\n{"".join(units)}'
        "</body>\n</tmx>\n"
    )


def unit(props: str = "", **texts: str) -> str:
    """Returns a translation unit. An underscore in a language stands for a hyphen."""
    variants = "".join(
        f'<tuv xml:lang="{tag.replace("_", "-")}"><seg>{text}</seg></tuv>'
        for tag, text in texts.items()
    )
    return f"<tu>{props}{variants}</tu>\n"


def read_pairs(*inputs: Path | str, **options: Any) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """Returns the pairs of inputs and the counts of dropped records by reason."""
    corpus = {
        name: options.pop(name)
        for name in ("encoding", "invalid_utf8", "max_record_bytes", "max_expansion")
        if name in options
    }
    texts = (PairText("", f"{{source}}{SEPARATOR}{{target}}"),)
    pairs = PairSettings(direction="forward", texts=texts, **options)
    settings = CorpusSettings(format="pairs", pairs=pairs, **corpus)
    files = find_inputs(
        [str(name) for name in inputs],
        settings.sides,
        with_scores=settings.pairs.score_name is not None,
    )
    found: list[tuple[str, str]] = []
    dropped: dict[str, int] = {}
    for chunk in CorpusReader(files, settings).chunks():
        result = parse_chunk(chunk, settings)
        for reason, number in result.num_dropped.items():
            dropped[reason] = dropped.get(reason, 0) + number
        for document in result.documents["text"]:
            assert not isinstance(document, str)
            first, second = document.segments[0].text.split(SEPARATOR)
            found.append((first, second))
    return found, dropped
