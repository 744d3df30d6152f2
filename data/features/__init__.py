"""Feature files: their contract, those of other tools, and what a folder of them says of itself."""
