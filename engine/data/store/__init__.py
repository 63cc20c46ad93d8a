"""Token ids on disk: the store, its writer, and the cache that builds it once."""
