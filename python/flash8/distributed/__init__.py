"""Context parallelism: attention of sequences whose tokens are spread over processes.

See docs/distributed.md. Nothing else of flash8 imports this package.
"""

from flash8.distributed.decoding import decode, own_seqlens
from flash8.distributed.methods import attention
from flash8.distributed.sharding import shard, unshard

__all__ = ["attention", "decode", "own_seqlens", "shard", "unshard"]
