"""The version, in a file that imports nothing: whoever writes it into a file asks here."""

__version__ = "0.1.0"
