"""gligen-xl: put objects where you draw them."""

__version__ = "0.1.0"
