"""Token ids on disk: the store, its writer, and the build cache."""
