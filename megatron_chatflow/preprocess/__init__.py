"""Converts corpora to indexed datasets.

`preprocess` reads the inputs named in a `PreprocessSettings` and writes
`<prefix>_<key>_document.{bin,idx,json}` and, for pairs and chats,
`<prefix>_<key>_loss_mask.{bin,idx}`. `job` runs the steps: it reads chunks of records (`readers`),
parses them to documents (`parse`, `pairs`, `chats`), encodes the documents (`encode`) and writes
them (`output`). A job can be split into partitions, which are merged at the end (`merge`).
"""

from megatron_chatflow.preprocess.job import parse_shard, preprocess
from megatron_chatflow.preprocess.settings import PreprocessSettings, settings_of_options

__all__ = ["PreprocessSettings", "parse_shard", "preprocess", "settings_of_options"]
