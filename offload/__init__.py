"""What a user touches: policy, models, jobs, command line."""
