"""Corpus to indexed datasets: joins the corpus readers, a tokenizer and the writer.

In: input files and `PreprocessSettings`. Out: `<prefix>_<key>_document.{bin,idx,json}` and, for
pairs and chats, `<prefix>_<key>_loss_mask.{bin,idx}`.
"""

from megatron_chatflow.preprocess.job import preprocess
from megatron_chatflow.preprocess.partitions import parse_shard
from megatron_chatflow.preprocess.settings import PreprocessSettings, settings_of_options

__all__ = ["PreprocessSettings", "parse_shard", "preprocess", "settings_of_options"]
