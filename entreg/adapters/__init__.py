"""Put the sparse path and the regulariser's probes into a stock model, and take them out again.

>>> handle = sparsify(model, 0.8)          # the best default plan for this kind of model
>>> logits = model(images)
>>> handle.remove()                        # the stock model again, bit for bit

The model's weights are never touched. (The paper does not say how its sparsity is applied; all of this is our choice.)
"""

from entreg.adapters.handles import Capture, ProbeHandle, Selection, SparsifyHandle
from entreg.adapters.timm_models import vision_model
from entreg.adapters.timm_vit import probe, sparsify

__all__ = ["Capture", "ProbeHandle", "Selection", "SparsifyHandle", "probe", "sparsify", "vision_model"]
