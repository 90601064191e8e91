"""Fewer tokens in the residual stream: dropping, merging, fusing, soft partition."""
