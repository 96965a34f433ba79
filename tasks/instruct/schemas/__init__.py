"""Public collections by the schemas of their publishers (TFDS's and Hugging Face's)."""
