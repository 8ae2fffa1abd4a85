"""From images to shards: sources, captions, boxes, frames, latents."""
