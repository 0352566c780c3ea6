"""bitsandbytes' weights in 4 bits as numbers again, in one launch."""

from .op import Dequantiser

__all__ = ["Dequantiser"]
