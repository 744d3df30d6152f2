"""A picture of which tokens an attention pattern connects."""
