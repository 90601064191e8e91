"""What tables and figures call the methods of training."""

from __future__ import annotations

LABELS = {
    "plain": "plain",
    "label_smoothing": "label smoothing",
    "row_entropy": "row entropy",
    "key_entropy": "key entropy",
    "selection_entropy": "selection entropy",
    "ball": "ball entropy, as published",
    "halfspace": "halfspace entropy, as published",
    "rate_distortion": "ball entropy with distortion",
    "l1_logits": "L1 on logits",
    "l1_gate": "L1 gate",
    "loop": "dropping, sparse in training",
    "ours": "ours",
    "ours_strong": "ours, strong penalty",
    "ours_sparse": "ours, partition in training",
}


def label(method: str) -> str:
    """What tables and figures call a method."""
    return LABELS.get(method, method.replace("_", " "))
