"""Hugging Face folders in and out: sliced reading, checked loading, atomic writing."""
