"""Vocabularies by the format of their file: each turns text into token ids, and an id into the bytes it stands for."""
