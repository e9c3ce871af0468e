"""What a model keeps of each token, found by running it without data.

`model_cache` says it: `trace_cache` (cache_trace) runs a few tokens through the model's
`meta_twin`, one of the blocks that are alike (alike_blocks) for all, under `OnMeta`
(on_meta), while a `CacheWatch` (cache_watch) notes what comes into its cache
(cache_contents). `model_kind` answers questions about a model's classes.
"""
