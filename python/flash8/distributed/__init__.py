"""Context parallelism: attention of sequences whose tokens are spread over processes.

See docs/distributed.md. Nothing else of flash8 imports this package.
"""

from flash8.distributed.attention import attention
from flash8.distributed.sharding import shard, unshard

__all__ = ["attention", "shard", "unshard"]
