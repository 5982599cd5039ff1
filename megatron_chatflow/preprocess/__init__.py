"""Preprocessing: turns corpora into indexed datasets.

`preprocess` reads the inputs of a `PreprocessSettings` and writes
`<prefix>_<key>_document.{bin,idx,json}` and, for pairs and chats,
`<prefix>_<key>_loss_mask.{bin,idx}`. Chunks of records are read (`readers`), parsed to documents
(`parse`, `pairs`, `chats`), encoded (`encode`) and written (`output`) by `job`, as a whole or in
`partitions`, which `merge` joins.
"""

from megatron_chatflow.preprocess.job import preprocess
from megatron_chatflow.preprocess.partitions import parse_shard
from megatron_chatflow.preprocess.settings import PreprocessSettings, settings_of_options

__all__ = ["PreprocessSettings", "parse_shard", "preprocess", "settings_of_options"]
