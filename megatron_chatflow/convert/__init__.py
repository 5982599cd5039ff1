"""Conversion from and to Hugging Face folders, between vocabularies, and its verification."""
