"""The measured search around a plan: `penstock tune`."""
