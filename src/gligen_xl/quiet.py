"""Notes of other libraries that nobody can act on are not printed; everything else of theirs is.

Each is a line about a part that is not installed and that nothing here uses: kernels of torchao for other machines, a
change inside torch that torchao has not made yet, kernels of bitsandbytes, the second reader of images of transformers.
"""

from __future__ import annotations

import logging

NOTES = {  # a logger, and what its notes hold
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "torch.utils._pytree": ("is an Enum subclass and is now natively supported",),
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
    "transformers.utils.import_utils": ("requires torchvision (not installed); falling back",),
}


class _Notes(logging.Filter):
    """Holds back the records of a logger that hold one of these texts."""

    def __init__(self, texts: tuple[str, ...]):
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in self.texts)


def hold_back_notes() -> None:
    """Filter the loggers of `NOTES`, each once."""
    for name, texts in NOTES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(former, _Notes) for former in logger.filters):
            logger.addFilter(_Notes(texts))
