"""What can be penalised: each module registers quantities of one layer; all are loaded with this package."""

from entreg.names import import_modules
from entreg.training.quantities.quantity import QUANTITIES, Quantity

__all__ = ["QUANTITIES", "Quantity"]

import_modules(__name__)
