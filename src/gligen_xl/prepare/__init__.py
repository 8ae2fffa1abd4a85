"""From pictures to shards: sources, captions, boxes, frames, latents."""
