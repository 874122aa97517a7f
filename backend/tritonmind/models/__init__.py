"""Decoders, their registry, and the loader that fills them from a workspace."""
