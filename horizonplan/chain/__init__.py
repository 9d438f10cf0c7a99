"""Any ``nn.Module`` as stem -> blocks -> head, and how its blocks are found."""

from horizonplan.chain.chain import Chain
from horizonplan.chain.trace import ChainError

__all__ = ["Chain", "ChainError"]
