"""`ple_data.storage.store` under the name that users' scripts have for it."""

from ple_data.storage.store import Shard, Store, collect, scan_shards

__all__ = ["Shard", "Store", "collect", "scan_shards"]
