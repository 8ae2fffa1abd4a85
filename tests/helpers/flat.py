"""Batches as one dictionary of tensors."""


def flat(loader):
    return [
        (batch.position, batch.latents.numpy().tobytes(), batch.noise.numpy().tobytes(), tuple(batch.time.tolist()),
         tuple(batch.captions), batch.boxes.numpy().tobytes(), batch.mask.numpy().tobytes())
        for batch in loader
    ]  # fmt: skip
