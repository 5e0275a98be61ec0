"""Rows from files and data sets -> token examples with loss masks -> packed batches, all on the host in NumPy."""
