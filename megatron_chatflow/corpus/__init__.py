"""Corpora: files of documents, sentence pairs and chats in; text with loss spans out.

This layer knows nothing of tokenizers: a document is text in segments, each with loss or without.
"""
