"""The keys of a policy: values, files, and what contradicts itself."""
