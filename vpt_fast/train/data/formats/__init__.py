"""Formats of data sets on disk: class folders, VTAB-1k, FGVC json files, Hugging Face."""
