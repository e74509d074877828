"""The link to transformers: attention's dispatch, and what is known of model families."""
