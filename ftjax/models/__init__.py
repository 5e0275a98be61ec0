"""Flax Linen decoders: the only place where a module system is used."""
