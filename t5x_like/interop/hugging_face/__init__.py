"""Hugging Face directories: one adapter a family, both ways from one table of names."""
