"""Causal decoders: which blocks and pages of keys are read, and what masks allow."""
