"""The viewer: a web page of this machine alone, over slides, features and predictions."""
