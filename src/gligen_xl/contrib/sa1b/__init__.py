"""The published latents and boxes of SA-1B: downloaded, read without running their pickles, and converted to shards."""
