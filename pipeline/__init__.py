"""The jobs that join `data` and `models`, and the command line."""
