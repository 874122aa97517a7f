"""Building blocks of decoders: they hold weights and call kernels."""
