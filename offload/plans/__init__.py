"""What a model, a policy and a machine come to: `penstock plan`."""
