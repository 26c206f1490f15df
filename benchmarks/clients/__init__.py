"""What other programs make of the checkpoints that this package writes.

`variants` writes tiny checkpoints, one per field of config.json, `run` opens them in one program, and `table` says for
each whether the program computes the same, computes something else, or refuses it.
"""
