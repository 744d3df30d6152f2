"""The version, in a file that imports nothing: whoever writes it into a file asks here."""

__version__ = "0.1.0"

SOFTWARE = f"longslide {__version__}"
"""What files say they were written by."""
