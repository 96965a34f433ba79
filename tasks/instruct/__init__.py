"""Instruction mixtures after FLAN: see docs/instruction.md.

sources     records of JSON Lines, Parquet or TFDS, and what makes cacheable examples of them
register    SeqIO Tasks of a collection: all templates, and one Task a kind of template
mixing      mixtures by size with a cap, by temperature, by explicit rates
schemas     public collections: how their examples become records, and their templates
public      registers those over TFDS
embedded    registers a mixture over data that ships with the package
"""
