"""The keys and values of a model that generates, in tiers of their own."""
