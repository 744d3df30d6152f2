"""What was made here in the layouts of other tools."""
